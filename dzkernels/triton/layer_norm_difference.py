from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import columns, launch_rows, row_coefficients, sum_of


@triton.jit
def _kernel(
    delta, zc, var, gamma, out, P, R, M, chunks, EPS: tl.constexpr, CENTRE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The mean is computed in two steps, the new variance from (zc + d)^2, as in csrc/cpu/layer_norm.h. If a block
    covers a row, the compiler sees loops of one iteration and reads delta and zc once."""
    piece = tl.program_id(0).to(tl.int64)  # chunks of perturbations vary fastest: they share a row of the base
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
    mean_e = tl.zeros((ROWS, 1, 1), dtype=tl.float64)
    squares, change = mean_e, mean_e
    for start in range(0, size, BLOCK):
        at = columns(start, BLOCK)
        d = tl.load(delta + row + at, mask=(p < P) & (at < M), other=0.0).to(tl.float32)
        z = tl.load(zc + r * M + at, mask=at < M, other=0.0)
        e = tl.where(at < M, d - shift, 0.0)
        w = z + e
        mean_e += sum_of(e)
        squares += sum_of(w * w)
        change += sum_of(e * (z + w))
    mean_e = mean_e * share if CENTRE else tl.zeros_like(mean_e)
    a, b, mean_e32 = row_coefficients(mean_e, squares * share, change * share, tl.load(var + r), EPS)
    for start in range(0, size, BLOCK):
        at = columns(start, BLOCK)
        d = tl.load(delta + row + at, mask=(p < P) & (at < M), other=0.0).to(tl.float32)
        z = tl.load(zc + r * M + at, mask=at < M, other=0.0)
        y = a * ((d - shift) - mean_e32) - b * z
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
