"""Rows of [P, R, M] differences over rows of an [R, M] base, and exponentials of them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_RUN = tl.constexpr(8)  # float32 terms that are added before the sum goes on in float64


@triton.jit
def columns(start, BLOCK: tl.constexpr):
    """[1, BLOCK / RUN, RUN]: start, start + 1, ..."""
    return start + (tl.arange(0, BLOCK // _RUN)[:, None] * _RUN + tl.arange(0, _RUN)[None, :])[None, :, :]


@triton.jit
def sum_of(terms):
    """[rows, BLOCK / RUN, RUN] -> [rows, 1, 1] float64"""
    return tl.sum(tl.sum(terms, 2).to(tl.float64), 1)[:, None, None]


@triton.jit
def moved_norm_of_row(left, moved, change, var, EPS: tl.constexpr):
    """(a, b, rest): a row's layer norm moves by a (e - rest) - b zc. From the means of e, (zc + e)^2 and e (2 zc + e),
    and the variance before, all float64."""
    moved, change = moved - left * left, change - left * left
    s, t = tl.sqrt(var + EPS), tl.sqrt(tl.where(moved < 0.0, 0.0, moved) + EPS)
    return (1.0 / t).to(tl.float32), (change / (s * t * (s + t))).to(tl.float32), left.to(tl.float32)


@triton.jit
def expm1(x):
    """exp(x) - 1 with a relative error below 4 roundings. Smaller x count as -87, larger ones as 88; NaN stays NaN."""
    x = tl.where(x < -87.0, -87.0, tl.where(x > 88.0, 88.0, x))
    rounded = x * 1.44269504 + 12582912.0  # 1.5 2^23: rounds to an integer, which then sits in the low bits
    k = rounded - 12582912.0
    r = (x - k * 0.693115234375) - k * 3.19461832987e-05  # log 2 in two parts
    q = r * (1.0 / 5040.0) + 1.0 / 720.0
    q = q * r + 1.0 / 120.0
    q = q * r + 1.0 / 24.0
    q = q * r + 1.0 / 6.0
    q = q * r + 0.5
    scale = ((rounded.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)  # 2^k
    return (r + r * r * q) * scale + (scale - 1.0)


def launch_rows(kernel: Any, delta: Tensor, *args: Tensor | None, out_dtype: torch.dtype, **constants: Any) -> Tensor:
    """The result of kernel(delta, *args, out, P, R, M, chunks, **constants, ROWS, BLOCK, WHOLE): a program has ROWS
    perturbations of a row, in blocks of BLOCK columns; WHOLE if that is all."""
    out = torch.empty(delta.shape, dtype=out_dtype, device=delta.device)
    if out.numel() > 0:
        perturbations, rows, width = delta.shape
        block = max(16, triton.next_power_of_2(width))
        if block > 8192:  # too much for the registers
            block = 2048
        together = min(triton.next_power_of_2(perturbations), max(1, 1024 // block))
        chunks = triton.cdiv(perturbations, together)
        kernel[(rows * chunks,)](
            delta, *args, out, perturbations, rows, width, chunks, ROWS=together, BLOCK=block, WHOLE=width <= block,
            **constants, num_warps=min(16, max(1, together * block // 256)),
        )  # fmt: skip
    return out
