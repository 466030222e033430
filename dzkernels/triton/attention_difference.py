from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import expm1_wide
from ._rows import expm1

# float32 operands are split into two tf32, three products each: as accurate as float32 sums.
_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _load(rows, stride, R, C, r, c):
    """rows[r, c] in float32, 0 outside [R, C]"""
    inside = (r < R)[:, None] & (c < C)[None, :]
    return tl.load(rows + r[:, None].to(tl.int64) * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _scores(operands, t, s, BLOCK_D: tl.constexpr):
    """(p, dS) at [t, s]; dS is 0 where p is 0, so that its value there does not matter."""
    dq, dq_t, dk, dk_s, q, q_t, k, k_s, prob, scale, T, S, D = operands
    d = tl.zeros((t.shape[0], s.shape[0]), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)
        if dq is not None:
            d = tl.dot(_load(dq, dq_t, T, D, t, c), tl.trans(_load(k, k_s, S, D, s, c)), d, input_precision=_PRECISION)
        if dk is not None:
            after = _load(q, q_t, T, D, t, c)
            if dq is not None:
                after += _load(dq, dq_t, T, D, t, c)
            d = tl.dot(after, tl.trans(_load(dk, dk_s, S, D, s, c)), d, input_precision=_PRECISION)
    p = _load(prob, S, T, S, t, s)
    return p, tl.where(p == 0.0, 0.0, d * scale)


@triton.jit
def _expm1_or_inf(d):
    """exp(d) - 1; infinite for d > 60."""
    return tl.where(d > 60.0, float("inf"), expm1(d))


@triton.jit
def _add(total, change, p, values, s, e):
    """total + change v + (p + change) dv, in parts of the columns to save registers."""
    dv, dv_s, v, v_s, S, E = values
    new = ()
    for i in tl.static_range(len(total)):
        part = total[i]
        c = e + i * e.shape[0]
        if change is not None:
            part = tl.dot(change, _load(v, v_s, S, E, s, c), part, input_precision=_PRECISION)
        if dv is not None:
            after = p if change is None else p + change
            part = tl.dot(after, _load(dv, dv_s, S, E, s, c), part, input_precision=_PRECISION)
        new += (part,)
    return new


@triton.jit
def _zeros(t, e, PARTS: tl.constexpr):
    parts = ()
    for _ in tl.static_range(PARTS):
        parts += (tl.zeros((t.shape[0], e.shape[0]), dtype=tl.float32),)
    return parts


@triton.jit
def _store(to, row_stride, total, rows, t, e, T, E):
    for i in tl.static_range(len(total)):
        c = e + i * e.shape[0]
        inside = (rows & (t < T))[:, None] & (c < E)[None, :]
        tl.store(to + t[:, None].to(tl.int64) * row_stride + c[None, :], total[i], mask=inside)


@triton.jit
def _far(operands, values, S, t, e, PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The result for rows whose sum of exponentials is far from 1, with the softmax in float64."""
    top = tl.full((t.shape[0], 1), -3e38, dtype=tl.float64)
    summed = tl.zeros_like(top)
    before = summed
    for start in range(0, S, BLOCK):
        p, d = _scores(operands, t, start + tl.arange(0, BLOCK), BLOCK_D)
        p, d = p.to(tl.float64), tl.where(p > 0.0, d, -3e38).to(tl.float64)
        higher = tl.maximum(top, tl.max(d, 1)[:, None])
        summed *= tl.exp(top - higher)
        summed += tl.sum(p * tl.exp(d - higher), 1)[:, None]
        before += tl.sum(p, 1)[:, None]
        top = higher
    # m = top + rest, not added: rest would be lost beside a large top
    rest = tl.log(summed / before)
    total = _zeros(t, e, PARTS)
    for start in range(0, S, BLOCK):
        s = start + tl.arange(0, BLOCK)
        p, d = _scores(operands, t, s, BLOCK_D)
        y = tl.where(p == 0.0, 0.0, (d.to(tl.float64) - top) - rest)
        change = tl.where(p == 0.0, 0.0, p.to(tl.float64) * expm1_wide(y)).to(tl.float32)
        total = _add(total, change, p, values, s, e)
    return total


@triton.jit
def _kernel(
    dq, dk, dv, q, k, v, prob, out, scale, P, N, H, T, S, D, E, tiles, dq_p, dq_n, dq_h, dq_t, dk_p, dk_n, dk_h, dk_s,
    dv_p, dv_n, dv_h, dv_s, q_n, q_h, q_t, k_n, k_h, k_s, v_n, v_h, v_s, P_CHANGES: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Two passes over the columns s; the first sums the exponentials. Rows whose sum is far from 1 are rare: _far
    computes them again (formulas in csrc/cpu/softmax.h)."""
    # tiles of rows vary fastest, then perturbations: they share a sample and head
    piece = tl.program_id(0).to(tl.int64)
    at, b = piece // tiles % P, piece // tiles // P
    n, h = b // H, b % H
    t = (piece % tiles * BLOCK_T).to(tl.int32) + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * (BLOCK_E * PARTS) + tl.arange(0, BLOCK_E)
    if dq is not None:
        dq += at * dq_p + n * dq_n + h * dq_h
    if dk is not None:
        dk += at * dk_p + n * dk_n + h * dk_h
    if dv is not None:
        dv += at * dv_p + n * dv_n + h * dv_h
    q += n * q_n + h * q_h
    k += n * k_n + h * k_h
    v += n * v_n + h * v_h
    prob += b * T * S
    operands = (dq, dq_t, dk, dk_s, q, q_t, k, k_s, prob, scale, T, S, D)
    values = (dv, dv_s, v, v_s, S, E)
    to = out + ((at * N + n) * T * H + h) * E
    total = _zeros(t, e, PARTS)
    columns = tl.arange(0, BLOCK_S)
    if not P_CHANGES:
        for start in range(0, S, BLOCK_S):
            s = start + columns
            total = _add(total, None, _load(prob, S, T, S, t, s), values, s, e)
        _store(to, H * E, total, t >= 0, t, e, T, E)
    else:
        sum_expm1 = tl.zeros((BLOCK_T,), dtype=tl.float64)
        for start in range(0, S, BLOCK_S):
            p, d = _scores(operands, t, start + columns, BLOCK_D)
            sum_expm1 += tl.sum((p * _expm1_or_inf(d)).to(tl.float64), 1)
        near = (sum_expm1 > -0.5) & (sum_expm1 < float("inf"))  # false for NaN
        shift, rate = sum_expm1.to(tl.float32)[:, None], (1.0 / (1.0 + sum_expm1)).to(tl.float32)[:, None]
        for start in range(0, S, BLOCK_S):
            s = start + columns
            p, d = _scores(operands, t, s, BLOCK_D)
            # expm1(d - m) = (expm1(d) - sum_expm1) / (1 + sum_expm1)
            total = _add(total, p * ((_expm1_or_inf(d) - shift) * rate), p, values, s, e)
        _store(to, H * E, total, near, t, e, T, E)
        if tl.sum((~near).to(tl.int32)) > 0:
            total = _far(operands, values, S, t, e, PARTS, 16, BLOCK_D)
            _store(to, H * E, total, ~near, t, e, T, E)


def run(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, q: Tensor, k: Tensor, v: Tensor, p: Tensor, *,
    scale: float, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    given = next(d for d in (dq, dk, dv) if d is not None)
    heads = q.dim() == 4
    operands = [_rows(values, heads) for values in (dq, dk, dv, q, k, v)]
    steps = [(0, 0, 0, 0) if values is None else values.stride()[:-1] for values in operands]
    samples, pairs, rows, inner = operands[3].shape
    others, width = v.shape[-2:]
    out = torch.empty(given.shape[0], samples, rows, pairs, width, dtype=out_dtype, device=q.device)
    if out.numel() > 0:
        # As large as the registers allow, which hold the split operands of a product.
        limits = {"BLOCK_T": (rows, 128), "BLOCK_S": (others, 32), "BLOCK_D": (inner, 16), "BLOCK_E": (width, 32)}
        block = {name: max(16, min(limit, triton.next_power_of_2(size))) for name, (size, limit) in limits.items()}
        tiles, parts = triton.cdiv(rows, block["BLOCK_T"]), min(4, triton.cdiv(width, block["BLOCK_E"]))
        grid = (samples * pairs * given.shape[0] * tiles, triton.cdiv(width, parts * block["BLOCK_E"]))
        _kernel[grid](
            *operands, p.contiguous(), out, scale, given.shape[0], samples, pairs, rows, others, inner, width, tiles,
            *(step for of in steps for step in of), P_CHANGES=dq is not None or dk is not None, PARTS=parts, **block,
            num_warps=block["BLOCK_T"] // 16, num_stages=1,
        )  # fmt: skip
    return out.transpose(2, 3) if heads else out.squeeze(3)


def _rows(values: Tensor | None, heads: bool) -> Tensor | None:
    """`values` with a contiguous last dimension, copied only if necessary, and with a dimension of heads."""
    if values is None:
        return None
    values = values if values.stride(-1) == 1 or values.shape[-1] == 1 else values.contiguous()
    return values if heads else values.unsqueeze(-3)
