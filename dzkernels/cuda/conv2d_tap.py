from __future__ import annotations

import torch
from torch import Tensor

from .._check import output_size
from . import launch

Size = tuple[int, int]


def run(
    x: Tensor, coord: Tensor, step: Tensor, *, kernel: Size, stride: Size, padding: Size, dilation: Size, groups: int,
    out_channels: int,
) -> Tensor:  # fmt: skip
    samples, channels, height, width = x.shape
    rows, columns = output_size(height, width, kernel, stride, padding, dilation)
    coord, step = coord.contiguous(), step.contiguous()
    out = torch.empty(coord.shape[0], samples, rows, columns, dtype=torch.float32, device=x.device)
    launch(
        __name__, x, coord, step, out,
        coord.shape[0], samples, height, width, rows, columns, *x.stride(),
        *stride, *padding, *dilation, channels // groups, out_channels // groups,
    )  # fmt: skip
    return out
