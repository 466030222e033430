from __future__ import annotations

import torch
from torch import Tensor

from .._check import output_size
from .._norm import moments
from ..reference import dense_conv2d as by_torch
from . import launch

Size = tuple[int, int]


def run(
    delta: Tensor, weight: Tensor, *, stride: Size, padding: Size, dilation: Size, groups: int,
    next_zc: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    count, samples, channels, height, width = delta.shape
    outs, _, *kernel = weight.shape
    plain = kernel == [3, 3] and stride == dilation == (1, 1) and groups == 1
    rows, columns = output_size(height, width, (kernel[0], kernel[1]), stride, padding, dilation)
    if not (plain and delta.dtype is torch.float32 and _winograd_pays(channels, outs, rows, columns)):
        return by_torch.run(
            delta, weight, stride=stride, padding=padding, dilation=dilation, groups=groups, next_zc=next_zc
        )
    images = delta.permute(0, 1, 3, 4, 2).contiguous()
    weight = weight.contiguous()
    out = torch.empty(count, samples, rows, columns, outs, dtype=torch.float32, device="cpu")
    launch(__name__, images, weight, out, count * samples, height, width, channels, rows, columns, outs, *padding)
    result = out.permute(0, 1, 4, 2, 3)
    return result if next_zc is None else (result, moments(result, next_zc))


def _winograd_pays(channels: int, outs: int, rows: int, columns: int) -> bool:
    """Whether Winograd's F(4x4, 3x3) beats oneDNN, as measured with AVX-512.

    A transform costs as much as a product over about 8 channels. With many channels the transforms of a chunk no longer
    fit in cache. Tiles that extend past the edge waste work.
    """
    covered = -(-rows // 4) * -(-columns // 4) * 16
    return min(channels, outs) >= 8 and channels * outs <= 128 * 128 and covered <= 2 * rows * columns
