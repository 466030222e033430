from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._check import output_size
from ._config import Config, launch

Size = tuple[int, int]


@triton.jit
def _kernel(
    x, coord, step, out, N, H, W, Ho, Wo, xn, xc, xh, xw, in_per_group, out_per_group,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)  # p * N + n
    p, n = plane // N, plane % N
    o, c = tl.load(coord + 4 * p), tl.load(coord + 4 * p + 1)
    i, j = tl.load(coord + 4 * p + 2), tl.load(coord + 4 * p + 3)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = pixel // Wo * STRIDE_H + i * DIL_H - PAD_H
    column = pixel % Wo * STRIDE_W + j * DIL_W - PAD_W
    inside = (pixel < Ho * Wo) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    source = x + n * xn + (o // out_per_group * in_per_group + c) * xc
    value = tl.load(source + row * xh + column * xw, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(step + p).to(tl.float32)
    tl.store(out + plane * Ho * Wo + pixel, tl.where(inside, value, 0.0), mask=pixel < Ho * Wo)


def run(
    x: Tensor, coord: Tensor, step: Tensor, *, kernel: Size, stride: Size, padding: Size, dilation: Size, groups: int,
    out_channels: int,
) -> Tensor:  # fmt: skip
    samples, channels, height, width = x.shape
    rows, columns = output_size(height, width, kernel, stride, padding, dilation)
    coord, step = coord.contiguous(), step.contiguous()
    out = torch.empty(coord.shape[0], samples, rows, columns, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out

    def start(config: Config) -> None:
        _kernel[(coord.shape[0] * samples, triton.cdiv(rows * columns, config["BLOCK"]))](
            x, coord, step, out, samples, height, width, rows, columns, *x.stride(), channels // groups,
            out_channels // groups, *stride, *padding, *dilation, **config,
        )  # fmt: skip

    whole = triton.next_power_of_2(rows * columns)
    configs = [{"BLOCK": min(block, whole), "num_warps": warps} for block, warps in ((1024, 4), (512, 4), (256, 2))]
    launch(__name__, (coord.shape[0], *x.shape, rows, columns, x.dtype), configs, start)
    return out
