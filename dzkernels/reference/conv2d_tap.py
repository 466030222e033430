from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def run(
    x: Tensor, coord: Tensor, step: Tensor, *, kernel: Size, stride: Size, padding: Size, dilation: Size, groups: int,
    out_channels: int,
) -> Tensor:  # fmt: skip
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    rows = (padded.shape[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    columns = (padded.shape[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    delta = x.new_empty(coord.shape[0], x.shape[0], rows, columns)
    for p, (o, c, i, j) in enumerate(coord.tolist()):
        plane = padded[:, o // (out_channels // groups) * (x.shape[1] // groups) + c]
        top, left = i * dilation[0], j * dilation[1]
        window = plane[:, top : top + (rows - 1) * stride[0] + 1, left : left + (columns - 1) * stride[1] + 1]
        delta[p] = step[p] * window[:, :: stride[0], :: stride[1]]
    return delta
