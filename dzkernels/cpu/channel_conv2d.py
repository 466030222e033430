from __future__ import annotations

import torch
from torch import Tensor

from .._check import output_size
from .._load import native

Size = tuple[int, int]


def channel_conv2d(
    delta: Tensor, channel: Tensor, weight: Tensor, *, stride: Size, padding: Size, dilation: Size, groups: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    perturbations, samples, height, width = delta.shape
    channels, per_group, kernel_h, kernel_w = weight.shape
    rows, columns = output_size("channel_conv2d", height, width, (kernel_h, kernel_w), stride, padding, dilation)
    delta, channel = delta.contiguous(), channel.contiguous()
    inner = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    out = torch.empty(perturbations, samples, rows, columns, channels, dtype=inner, device="cpu")
    native().channel_conv2d(
        delta.data_ptr(), channel.data_ptr(), weight.data_ptr(), out.data_ptr(),
        perturbations, samples, height, width, rows, columns, channels, kernel_h, kernel_w, *weight.stride(),
        *stride, *padding, *dilation, per_group, channels // groups, inner == torch.bfloat16,
    )  # fmt: skip
    return out.to(out_dtype).permute(0, 1, 4, 2, 3)
