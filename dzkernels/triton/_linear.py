"""Rows of [P, R, K] differences as left factors of products on tensor cores."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._norm import RowNorm
from ._rows import columns, moved_norm_of_row, sum_of

_BLOCK = tl.constexpr(64)  # columns that moments are summed of at a time


@triton.jit
def tile_rows(tile, P, R, TOGETHER: tl.constexpr, ROWS: tl.constexpr):
    """Where the ROWS rows of a tile lie in [P, R] and in the base [R], and which of them there are.

    TOGETHER perturbations of a row of the base are neighbours, and tiles of the same rows are: so each number of the
    base comes once into a multiprocessor and stays in L2 for the tiles to come."""
    chunks = (P + TOGETHER - 1) // TOGETHER
    i = tl.arange(0, ROWS)
    p = tile % chunks * TOGETHER + i % TOGETHER
    r = tile // chunks * (ROWS // TOGETHER) + i // TOGETHER
    return p * R + r, r, (p < P) & (r < R)


@triton.jit
def _moved_norms(delta, zc, var, q, r, inside, K, EPS: tl.constexpr):
    """(shift, rest, a, b), [rows, 1] each: the norm of a row moves by a (d - shift - rest) - b zc. Sums as in
    layer_norm_difference.py, in short blocks to save registers: the rows are read from cache twice more."""
    q, r, inside = q[:, None, None], r[:, None, None], inside[:, None, None]
    share = tl.full((1, 1, 1), 1.0, tl.float64) / K
    total = tl.zeros((q.shape[0], 1, 1), dtype=tl.float64)
    for start in range(0, K, _BLOCK):
        at = columns(start, _BLOCK)
        total += sum_of(tl.load(delta + q * K + at, mask=inside & (at < K), other=0.0).to(tl.float32))
    shift = (total * share).to(tl.float32)
    left = tl.zeros_like(total)
    moved, change = left, left
    for start in range(0, K, _BLOCK):
        at = columns(start, _BLOCK)
        d = tl.load(delta + q * K + at, mask=inside & (at < K), other=0.0).to(tl.float32)
        z = tl.load(zc + r * K + at, mask=inside & (at < K), other=0.0)
        e = tl.where(at < K, d - shift, 0.0)
        w = z + e
        left += sum_of(e)
        moved += sum_of(w * w)
        change += sum_of(e * (z + w))
    before = tl.load(var + r, mask=inside, other=1.0)
    a, b, rest = moved_norm_of_row(left * share, moved * share, change * share, before, EPS)
    rows: tl.constexpr = (q.shape[0], 1)
    return tl.reshape(shift, rows), tl.reshape(rest, rows), tl.reshape(a, rows), tl.reshape(b, rows)


@triton.jit
def held_rows(
    delta, zc, var, gamma, q, r, inside, K, NUMBER: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows q of delta, or of its layer norm where there is zc, as PARTS left factors [rows, BLOCK] of dtype NUMBER,
    0 past K columns. Rows that are not inside may be NaN (eps = 0): their results are not to be stored."""
    if zc is not None:
        shift, rest, a, b = _moved_norms(delta, zc, var, q, r, inside, K, EPS)
    left = ()
    for i in tl.static_range(PARTS):
        k = i * BLOCK + tl.arange(0, BLOCK)[None, :]
        held = inside[:, None] & (k < K)
        d = tl.load(delta + q[:, None] * K + k, mask=held, other=0.0)
        if zc is not None:
            d = a * ((d.to(tl.float32) - shift) - rest) - b * tl.load(zc + r[:, None] * K + k, mask=held, other=0.0)
            if gamma is not None:
                d *= tl.load(gamma + k, mask=k < K, other=0.0)
            d = tl.where(k < K, d, 0.0)
        left += (d.to(NUMBER),)
    return left


@triton.jit
def add_product(total, left, weight, o, k, M, K, UPCAST: tl.constexpr):
    """total + left weight[o, k]^T, on tensor cores: float32 as three products of tf32 halves, as good as float32."""
    at, held = o[:, None].to(tl.int64) * K + k[None, :], (o < M)[:, None] & (k < K)[None, :]
    right = tl.load(weight + at, mask=held, other=0.0)
    if UPCAST:  # Triton's interpreter takes bfloat16 operands for integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, tl.trans(right), total, input_precision="tf32x3")


@triton.jit
def give(out, residual, values, q, inside, o, M):
    """out[q, o] = values, plus the residual there where there is one."""
    at, held = q[:, None] * M + o[None, :], inside[:, None] & (o < M)[None, :]
    if residual is not None:
        values += tl.load(residual + at, mask=held, other=0.0).to(tl.float32)
    tl.store(out + at, values, mask=held)


def block_of(width: int) -> int:
    """tl.dot takes at least 16 x 16 x 16."""
    return max(16, triton.next_power_of_2(width))


def parts_of(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """(parts, block): at most four blocks that cover a row with the least left over; (0, block) where a row is too long
    to be held by a program. Halves of float32 operands lie in registers, so its blocks are shorter."""
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
