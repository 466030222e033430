"""Row-wise kernels on differences [P, R, M] with a base [R, M]: sums, launches, and expm1."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_RUN = tl.constexpr(8)  # float32 terms summed before the total is widened to float64


@triton.jit
def columns(start, BLOCK: tl.constexpr):
    """[1, BLOCK / RUN, RUN]: start, start + 1, ..."""
    return start + (tl.arange(0, BLOCK // _RUN)[:, None] * _RUN + tl.arange(0, _RUN)[None, :])[None, :, :]


@triton.jit
def sum_of(terms):
    """[rows, BLOCK / RUN, RUN] -> [rows, 1, 1] float64"""
    return tl.sum(tl.sum(terms, 2).to(tl.float64), 1)[:, None, None]


@triton.jit
def row_coefficients(mean_e, squares, change, var, EPS: tl.constexpr):
    """(a, b, mean_e) in float32: the layer norm of a row changes by a (e - mean_e) - b zc. The arguments are the means
    of e, of (zc + e)^2 and of e (2 zc + e), and the old variance, all float64."""
    new_var, dvar = squares - mean_e * mean_e, change - mean_e * mean_e
    s, t = tl.sqrt(var + EPS), tl.sqrt(tl.where(new_var < 0.0, 0.0, new_var) + EPS)
    return (1.0 / t).to(tl.float32), (dvar / (s * t * (s + t))).to(tl.float32), mean_e.to(tl.float32)


@triton.jit
def expm1(x):
    """exp(x) - 1 with a relative error below 4 u. x is clamped to -87 .. 88; NaN stays NaN."""
    x = tl.where(x < -87.0, -87.0, tl.where(x > 88.0, 88.0, x))
    rounded = x * 1.44269504 + 12582912.0  # 1.5 2^23: adding it rounds to an integer, in the low bits
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
    """The result of kernel(delta, *args, out, P, R, M, chunks, **constants, ROWS, BLOCK, WHOLE). A program handles ROWS
    perturbations of one row, in blocks of BLOCK columns; WHOLE: one block covers the row."""
    out = torch.empty(delta.shape, dtype=out_dtype, device=delta.device)
    if out.numel() > 0:
        perturbations, rows, width = delta.shape
        block = max(16, triton.next_power_of_2(width))
        if block > 8192:  # more does not fit in registers
            block = 2048
        together = min(triton.next_power_of_2(perturbations), max(1, 1024 // block))
        chunks = triton.cdiv(perturbations, together)
        kernel[(rows * chunks,)](
            delta, *args, out, perturbations, rows, width, chunks, ROWS=together, BLOCK=block, WHOLE=width <= block,
            **constants, num_warps=min(16, max(1, together * block // 256)),
        )  # fmt: skip
    return out
