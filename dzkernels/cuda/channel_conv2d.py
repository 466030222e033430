from __future__ import annotations

import torch
from torch import Tensor

from .._check import output_size
from . import launch

Size = tuple[int, int]


def run(
    delta: Tensor, channel: Tensor, weight: Tensor, *, stride: Size, padding: Size, dilation: Size, groups: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    perturbations, samples, height, width = delta.shape
    channels, per_group, kernel_h, kernel_w = weight.shape
    rows, columns = output_size(height, width, (kernel_h, kernel_w), stride, padding, dilation)
    delta, channel = delta.contiguous(), channel.contiguous()
    out = torch.empty(perturbations, samples, rows, columns, channels, dtype=torch.float32, device=delta.device)
    launch(
        __name__, delta, channel, weight, out,
        perturbations, samples, height, width, rows, columns, channels, kernel_h, kernel_w, *weight.stride(),
        *stride, *padding, *dilation, per_group, channels // groups,
    )  # fmt: skip
    return out.to(out_dtype).permute(0, 1, 4, 2, 3)
