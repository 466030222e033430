"""Products of the rows of differences [P, R, K] on tensor cores."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._norm import RowNorm
from ._rows import columns, row_coefficients, sum_of

_BLOCK = tl.constexpr(64)  # columns whose moments are summed at a time


@triton.jit
def tile_rows(tile, P, R, TOGETHER: tl.constexpr, ROWS: tl.constexpr):
    """(index in [P, R], index in the base [R], whether it exists) for the ROWS rows of a tile.

    A tile holds TOGETHER perturbations of each of its base rows, and tiles of the same base rows are consecutive: a
    base value is loaded once per tile and stays in L2 for the next tiles."""
    chunks = (P + TOGETHER - 1) // TOGETHER
    i = tl.arange(0, ROWS)
    p = tile % chunks * TOGETHER + i % TOGETHER
    r = tile // chunks * (ROWS // TOGETHER) + i // TOGETHER
    return p * R + r, r, (p < P) & (r < R)


@triton.jit
def _row_norms(delta, zc, var, q, r, inside, K, EPS: tl.constexpr):
    """(shift, mean_e, a, b), [rows, 1] each: the norm of a row changes by a ((d - shift) - mean_e) - b zc. Sums as in
    layer_norm_difference.py, in short blocks to save registers; this reads the rows from cache twice more."""
    q, r, inside = q[:, None, None], r[:, None, None], inside[:, None, None]
    share = tl.full((1, 1, 1), 1.0, tl.float64) / K
    total = tl.zeros((q.shape[0], 1, 1), dtype=tl.float64)
    for start in range(0, K, _BLOCK):
        at = columns(start, _BLOCK)
        total += sum_of(tl.load(delta + q * K + at, mask=inside & (at < K), other=0.0).to(tl.float32))
    shift = (total * share).to(tl.float32)
    sum_e = tl.zeros_like(total)
    squares, change = sum_e, sum_e
    for start in range(0, K, _BLOCK):
        at = columns(start, _BLOCK)
        d = tl.load(delta + q * K + at, mask=inside & (at < K), other=0.0).to(tl.float32)
        z = tl.load(zc + r * K + at, mask=inside & (at < K), other=0.0)
        e = tl.where(at < K, d - shift, 0.0)
        w = z + e
        sum_e += sum_of(e)
        squares += sum_of(w * w)
        change += sum_of(e * (z + w))
    before = tl.load(var + r, mask=inside, other=1.0)
    a, b, mean_e = row_coefficients(sum_e * share, squares * share, change * share, before, EPS)
    rows: tl.constexpr = (q.shape[0], 1)
    return tl.reshape(shift, rows), tl.reshape(mean_e, rows), tl.reshape(a, rows), tl.reshape(b, rows)


@triton.jit
def load_rows(
    delta, zc, var, gamma, q, r, inside, K, NUMBER: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows q of delta, after the layer norm if zc is given, as PARTS left factors [rows, BLOCK] of dtype NUMBER, 0
    past column K. Rows that are not `inside` may be NaN (with eps = 0); their results must not be stored."""
    if zc is not None:
        shift, mean_e, a, b = _row_norms(delta, zc, var, q, r, inside, K, EPS)
    left = ()
    for i in tl.static_range(PARTS):
        k = i * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (k < K)
        d = tl.load(delta + q[:, None] * K + k, mask=mask, other=0.0)
        if zc is not None:
            d = a * ((d.to(tl.float32) - shift) - mean_e) - b * tl.load(zc + r[:, None] * K + k, mask=mask, other=0.0)
            if gamma is not None:
                d *= tl.load(gamma + k, mask=k < K, other=0.0)
            d = tl.where(k < K, d, 0.0)
        left += (d.to(NUMBER),)
    return left


@triton.jit
def add_product(total, left, weight, o, k, M, K, UPCAST: tl.constexpr):
    """total + left weight[o, k]^T on tensor cores. float32 operands are split into two tf32, three products each."""
    at, mask = o[:, None].to(tl.int64) * K + k[None, :], (o < M)[:, None] & (k < K)[None, :]
    right = tl.load(weight + at, mask=mask, other=0.0)
    if UPCAST:  # Triton's interpreter treats bfloat16 operands as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, tl.trans(right), total, input_precision="tf32x3")


@triton.jit
def store_rows(out, residual, values, q, inside, o, M):
    """out[q, o] = values + residual[q, o]; a missing residual counts as 0."""
    at, mask = q[:, None] * M + o[None, :], inside[:, None] & (o < M)[None, :]
    if residual is not None:
        values += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, values, mask=mask)


def block_of(width: int) -> int:
    """A block of at least `width`; tl.dot needs at least 16 x 16 x 16."""
    return max(16, triton.next_power_of_2(width))


def parts_of(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """(parts, block): at most four blocks that cover a row with the least padding; (0, block) if a row is too long for
    the registers of a program. Blocks of float32 are shorter, as each operand is split into two tf32."""
    largest = 64 if dtype == torch.bfloat16 else 32
    if width > 4 * largest:
        return 0, largest
    blocks = [block for block in (largest, 32, 16) if triton.cdiv(width, block) <= 4]
    block = min(blocks, key=lambda block: triton.cdiv(width, block) * block)
    return triton.cdiv(width, block), block


def operand_dtype(operands: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if operands == torch.bfloat16 else torch.float32


def norm_arguments(norm: RowNorm | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if norm is None:
        return None, None, None
    return norm.zc.contiguous(), norm.var.contiguous(), None if norm.gamma is None else norm.gamma.float().contiguous()


def constants(norm: RowNorm | None, perturbations: int) -> dict[str, Any]:
    return {
        "EPS": 0.0 if norm is None else norm.eps,
        "TOGETHER": min(16, triton.next_power_of_2(perturbations)),
        "UPCAST": os.environ.get("TRITON_INTERPRET") == "1",
    }
