from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import columns, launch_rows, moved_norm_of_row, sum_of


@triton.jit
def _kernel(
    delta, zc, var, gamma, out, P, R, M, chunks, EPS: tl.constexpr, CENTRE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The mean is taken in two rounds and the new variance from (zc + d)^2, as in csrc/cpu/layer_norm_difference.cpp.
    Where a block is a whole row, the compiler sees loops of one round and reads delta and zc once."""
    piece = tl.program_id(0).to(tl.int64)  # perturbations that share a row of the base are neighbours
    r = piece // chunks
    p = piece % chunks * ROWS + tl.arange(0, ROWS)[:, None, None]
    row, size = (p * R + r) * M, BLOCK if WHOLE else M
    share = tl.full((1, 1, 1), 1.0, tl.float64) / M
    shift = tl.zeros((ROWS, 1, 1), dtype=tl.float32)
    if CENTRE:
        total = tl.zeros((ROWS, 1, 1), dtype=tl.float64)
        for start in range(0, size, BLOCK):
            at = columns(start, BLOCK)
            total += sum_of(tl.load(delta + row + at, mask=(p < P) & (at < M), other=0.0).to(tl.float32))
        shift = (total * share).to(tl.float32)
    left = tl.zeros((ROWS, 1, 1), dtype=tl.float64)
    moved, change = left, left
    for start in range(0, size, BLOCK):
        at = columns(start, BLOCK)
        d = tl.load(delta + row + at, mask=(p < P) & (at < M), other=0.0).to(tl.float32)
        z = tl.load(zc + r * M + at, mask=at < M, other=0.0)
        e = tl.where(at < M, d - shift, 0.0)
        w = z + e
        left += sum_of(e)
        moved += sum_of(w * w)
        change += sum_of(e * (z + w))
    left = left * share if CENTRE else tl.zeros_like(left)
    a, b, rest = moved_norm_of_row(left, moved * share, change * share, tl.load(var + r), EPS)
    for start in range(0, size, BLOCK):
        at = columns(start, BLOCK)
        d = tl.load(delta + row + at, mask=(p < P) & (at < M), other=0.0).to(tl.float32)
        z = tl.load(zc + r * M + at, mask=at < M, other=0.0)
        y = a * ((d - shift) - rest) - b * z
        if gamma is not None:
            y *= tl.load(gamma + at, mask=at < M, other=0.0)
        tl.store(out + row + at, y, mask=(p < P) & (at < M))


def run(
    delta: Tensor, zc: Tensor, var: Tensor, gamma: Tensor | None, *, eps: float, centre: bool, out_dtype: torch.dtype
) -> Tensor:
    weight = None if gamma is None else gamma.float().contiguous()
    return launch_rows(
        _kernel, delta.contiguous(), zc.contiguous(), var.contiguous(), weight, out_dtype=out_dtype, EPS=eps,
        CENTRE=centre,
    )  # fmt: skip
