from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._norm import RowNorm
from . import gelu_difference, linear_difference
from ._config import Config, launch
from ._linear import (
    add_product,
    block_of,
    constants,
    load_rows,
    norm_arguments,
    operand_dtype,
    parts_of,
    store_rows,
    tile_rows,
)
from .gelu_difference import INV_SQRT_2PI, NEAR, V1, V3, far_change, gelu_tail, mills


@triton.jit
def _slope_tanh(x):
    """The slope of GELU's tanh form x s(x) with s = sigmoid(v), v = V1 x + V3 x^3."""
    x = tl.where(x > 14.0, 14.0, tl.where(x < -14.0, -14.0, x))
    square = x * x
    e = tl.exp(-tl.abs(x) * (V1 + V3 * square))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e * r, r) + x * (e * r * r) * (V1 + 3.0 * V3 * square)


@triton.jit
def _near_change(d, z, TANH: tl.constexpr):
    """gelu(z + d) - gelu(z) for |d| <= 1/4, computed from z and d alone: precomputed coefficients would take too many
    registers.

    It is d times the mean slope over the interval. Tanh form: by Gauss quadrature with three points; relative error
    4e-9. Otherwise by the odd derivatives at the middle m, sum_n (d/2)^2n / (2n+1)! gelu^(2n+1)(m). Apart from Phi(m)
    these are phi(m) m times polynomials in m^2. Four terms are used; relative error 2e-10."""
    middle = z + 0.5 * d
    if TANH:
        ends = _slope_tanh(z + 0.1127016653792583 * d) + _slope_tanh(z + 0.8872983346207417 * d)
        return d * ((4.0 / 9.0) * _slope_tanh(middle) + (5.0 / 18.0) * ends)
    m = tl.where(middle > 14.0, 14.0, tl.where(middle < -14.0, -14.0, middle))
    x, square, step = tl.abs(m), m * m, 0.25 * d * d
    r = 1.0 / (x + 3.0)
    phi = tl.exp(-0.5 * square) * INV_SQRT_2PI
    tail = phi * (mills((x - 3.0) * r) * r)
    third, fifth = square - 4.0, (square - 11.0) * square + 18.0
    seventh = ((square - 22.0) * square + 115.0) * square - 120.0
    series = (seventh * (1.0 / 5040.0) * step + fifth * (1.0 / 120.0)) * step + third * (1.0 / 6.0)
    return d * (tl.where(m < 0.0, tail, 1.0 - tail) + m * phi * (series * step + 1.0))


@triton.jit
def _change(d, z, TANH: tl.constexpr):
    """gelu(z + d) - gelu(z). The method is chosen per element, so a result does not depend on its neighbours."""
    change, far = _near_change(d, z, TANH), tl.abs(d) > NEAR
    if tl.sum(far.to(tl.int32)) > 0:
        change = tl.where(far, far_change(d, z, gelu_tail(z, TANH), TANH), change)
    return change


@triton.jit
def _kernel(
    delta, zc, var, gamma, up, z, down, residual, out, P, R, K, H, M, TANH: tl.constexpr, EPS: tl.constexpr,
    TOGETHER: tl.constexpr, UPCAST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, OUTS: tl.constexpr,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The result for a tile of rows, which are read and normalised once. The hidden layer is computed HIDDEN columns at
    a time; it and the sums of the second product stay in registers."""
    q, r, inside = tile_rows(tl.program_id(0).to(tl.int64), P, R, TOGETHER, ROWS)
    left = load_rows(delta, zc, var, gamma, q, r, inside, K, up.dtype.element_ty, EPS, PARTS, BLOCK)
    o = tl.arange(0, OUTS)
    total = tl.zeros((ROWS, OUTS), dtype=tl.float32)
    for start in range(0, H, HIDDEN):
        h = start + tl.arange(0, HIDDEN)
        d = tl.zeros((ROWS, HIDDEN), dtype=tl.float32)
        for i in tl.static_range(PARTS):
            d = add_product(d, left[i], up, h, i * BLOCK + tl.arange(0, BLOCK), H, K, UPCAST)
        base = tl.load(z + r[:, None] * H + h[None, :], mask=inside[:, None] & (h < H)[None, :], other=0.0)
        change = _change(d, base, TANH).to(down.dtype.element_ty)
        total = add_product(total, change, down, o, h, M, H, UPCAST)
    store_rows(out, residual, total, q, inside, o, M)


def run(
    delta: Tensor, up: Tensor, z: Tensor, down: Tensor, residual: Tensor | None, norm: RowNorm | None, *,
    approximate: str, operands: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    perturbations, rows, width = delta.shape
    hidden, outs, dtype = len(up), len(down), operand_dtype(operands)
    parts, block = parts_of(width, dtype)
    if parts == 0 or parts_of(outs, dtype)[0] == 0:  # rows or sums do not fit in registers: store the hidden layer
        inner = linear_difference.run(delta, up, None, norm, operands=operands, out_dtype=torch.float32)
        inner = gelu_difference.run(inner, z, approximate=approximate, out_dtype=dtype)
        return linear_difference.run(inner, down, residual, None, operands=operands, out_dtype=out_dtype)
    out = torch.empty(perturbations, rows, outs, dtype=out_dtype, device=delta.device)
    if out.numel() > 0:
        delta, up, z, down = delta.contiguous(), up.to(dtype).contiguous(), z.contiguous(), down.to(dtype).contiguous()
        residual = None if residual is None else residual.contiguous()
        fixed, hidden_block = constants(norm, perturbations), min(32, block_of(hidden))

        def start(config: Config) -> None:
            together = fixed["TOGETHER"]
            tiles = triton.cdiv(perturbations, together) * triton.cdiv(rows, config["ROWS"] // together)
            _kernel[(tiles,)](
                delta, *norm_arguments(norm), up, z, down, residual, out, perturbations, rows, width, hidden, outs,
                TANH=approximate == "tanh", PARTS=parts, BLOCK=block, OUTS=block_of(outs), HIDDEN=hidden_block,
                **fixed, **config,
            )  # fmt: skip

        # Not tuned: BLOCK and HIDDEN, on which the order of sums depends, and numbers of rows that select other
        # instructions.
        size = 64 if dtype == torch.bfloat16 else 32
        configs = [
            {"ROWS": size, "num_warps": warps, "num_stages": stages} for warps, stages in ((8, 2), (8, 3), (4, 2))
        ]
        kinds = (approximate, delta.dtype, dtype, out_dtype, norm is not None)
        kinds += (None if residual is None else residual.dtype,)
        launch(__name__, (perturbations, rows, width, hidden, outs, *kinds), configs, start)
    return out
