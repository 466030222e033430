from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import expm1_wide, log1p_wide
from ._rows import columns, expm1, launch_rows, sum_of


@triton.jit
def _kernel(
    delta, prob, out, P, R, K, chunks, LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Formulas as in csrc/cpu/softmax.h. If a block covers a row, the compiler sees loops of one iteration and reads
    delta and prob once. Rows whose sum of exponentials is far from 1 are rare; they run in float64, FAR columns at a
    time."""
    FAR: tl.constexpr = max(16, 256 // ROWS)
    piece = tl.program_id(0).to(tl.int64)  # chunks of perturbations vary fastest: they share a row of the base
    r = piece // chunks
    q = piece % chunks * ROWS + tl.arange(0, ROWS)[:, None, None]
    row, size = (q * R + r) * K, BLOCK if WHOLE else K
    sum_expm1 = tl.zeros((ROWS, 1, 1), dtype=tl.float64)  # exp(m) - 1
    for start in range(0, size, BLOCK):
        at = columns(start, BLOCK)
        p = tl.load(prob + r * K + at, mask=at < K, other=0.0)
        d = tl.load(delta + row + at, mask=(q < P) & (at < K), other=0.0)
        d = tl.where(p == 0.0, 0.0, d)  # where p is 0 the value of d must not matter
        sum_expm1 += sum_of(p * tl.where(d > 60.0, float("inf"), expm1(d)))
    near = (sum_expm1 > -0.5) & (sum_expm1 < float("inf"))  # false for NaN
    if LOG:
        shift = log1p_wide(tl.where(near, sum_expm1, 0.0)).to(tl.float32)
    else:
        shift, scale = sum_expm1.to(tl.float32), (1.0 / (1.0 + sum_expm1)).to(tl.float32)
    for start in range(0, size, BLOCK):
        at = columns(start, BLOCK)
        p = tl.load(prob + r * K + at, mask=at < K, other=0.0)
        d = tl.load(delta + row + at, mask=(q < P) & (at < K), other=0.0)
        # expm1(d - m) = (expm1(d) - sum_expm1) / (1 + sum_expm1)
        y = d - shift if LOG else p * ((expm1(tl.where(p == 0.0, 0.0, d)) - shift) * scale)
        tl.store(out + row + at, y, mask=(q < P) & (at < K) & near)
    if tl.sum((~near).to(tl.int32)) > 0:
        top = tl.full((ROWS, 1, 1), float("-inf"), dtype=tl.float32)
        for start in range(0, K, FAR):
            at = columns(start, FAR)
            p = tl.load(prob + r * K + at, mask=at < K, other=0.0)
            d = tl.load(delta + row + at, mask=(q < P) & (at < K), other=0.0)
            top = tl.maximum(top, tl.max(tl.max(tl.where(p > 0.0, d, float("-inf")), 2), 1)[:, None, None])
        total, before = tl.zeros_like(sum_expm1), tl.zeros_like(sum_expm1)
        for start in range(0, K, FAR):
            at = columns(start, FAR)
            p = tl.load(prob + r * K + at, mask=at < K, other=0.0).to(tl.float64)
            d = tl.load(delta + row + at, mask=(q < P) & (at < K), other=0.0).to(tl.float64)
            total += sum_of(p * tl.exp(tl.where(p == 0.0, 0.0, d - top)))
            before += sum_of(p + tl.zeros_like(d))
        # m = top + rest, not added: rest would be lost beside a large top
        rest = tl.log(total / before)
        for start in range(0, K, FAR):
            at = columns(start, FAR)
            p = tl.load(prob + r * K + at, mask=at < K, other=0.0).to(tl.float64)
            d = tl.load(delta + row + at, mask=(q < P) & (at < K), other=0.0).to(tl.float64)
            y = (d - top) - rest
            if not LOG:
                y = tl.where(p == 0.0, 0.0, p * expm1_wide(tl.where(p == 0.0, 0.0, y)))
            tl.store(out + row + at, y, mask=(q < P) & (at < K) & ~near)


def run(delta: Tensor, p: Tensor, *, log: bool) -> Tensor:
    return launch_rows(_kernel, delta.contiguous(), p.contiguous(), out_dtype=delta.dtype, LOG=log)
