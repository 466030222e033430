from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# As in csrc/cpu/gelu.h, which states the truncation error of the series.
_TERMS = tl.constexpr(8)
NEAR = tl.constexpr(0.25)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
V1 = tl.constexpr(1.5957691216057308)
V3 = tl.constexpr(1.5957691216057308 * 0.044715)


@triton.jit
def mills(y):
    """(x + 3) Phi(-x) / phi(x) as a polynomial in y = (x - 3) / (x + 3), 0 <= x <= 15; relative error at most 9e-11,
    and u in float32."""
    f = y * -2.2031826897113847e-05 - 2.9152940299406922e-05
    f = f * y + 0.00016843781962652788
    f = f * y + 0.00037650760293290455
    f = f * y - 0.0006301951393846801
    f = f * y - 0.002616163699218805
    f = f * y + 0.0025728586437078955
    f = f * y + 0.01747667246129319
    f = f * y - 0.02622618801269794
    f = f * y - 0.11847074665070713
    f = f * y + 0.5765689055785872
    f = f * y - 1.2767059489497459
    return f * y + 1.82754179237969


@triton.jit
def _series(z, TANH: tl.constexpr):
    """Taylor coefficients of s at z, where gelu(x) = x s(x), and |z| s(-|z|); all float64."""
    x = tl.abs(z)
    if TANH:
        e = tl.exp(-x * (V1 + V3 * x * x))
        r = 1.0 / (1.0 + e)
        v1, v2, v3 = V1 + 3.0 * V3 * z * z, 6.0 * V3 * z, 3.0 * V3  # of the argument's slope
        odd = tl.where(z < 0.0, (1.0 - e) * r, (e - 1.0) * r)  # 1 - 2 s
        s = (tl.where(z < 0.0, e * r, r),)
        w = (e * r * r,)  # s (1 - s), with s' = s (1 - s) v'
        for n in tl.static_range(_TERMS):
            if n > 0:
                product = odd * s[n]
                for i in tl.static_range(1, n):
                    product -= s[i] * s[n - i]
                w += (product,)
            slope = w[n] * v1
            if n > 0:
                slope += w[n - 1] * v2
            if n > 1:
                slope += w[n - 2] * v3
            s += (slope * (1.0 / (n + 1)),)
        return s, x * e * r
    else:
        r = 1.0 / (x + 3.0)
        phi = tl.exp(-0.5 * x * x) * INV_SQRT_2PI
        tail = phi * mills((x - 3.0) * r) * r
        s = (tl.where(z < 0.0, tail, 1.0 - tail),)
        before = tl.zeros_like(phi)
        for n in tl.static_range(_TERMS):
            s += (phi * (1.0 / (n + 1)),)
            after = -(z * phi + before) * (1.0 / (n + 1))
            before = phi
            phi = after
        return s, x * tail


@triton.jit
def gelu_tail(x, TANH: tl.constexpr):
    """max(x, 0) - gelu(x) with an error below 2e-8."""
    x = tl.abs(x)
    x = tl.where(x > 14.0, 14.0, x)
    if TANH:
        return x / (1.0 + tl.exp(x * (V1 + V3 * x * x)))
    r = 1.0 / (x + 3.0)
    return x * (tl.exp(-0.5 * x * x) * INV_SQRT_2PI) * (mills((x - 3.0) * r) * r)


@triton.jit
def far_change(d, z, tail, TANH: tl.constexpr):
    """gelu(z + d) - gelu(z) for |d| that is not small: (max(z + d, 0) - max(z, 0)) - (gelu_tail(z + d) - tail), where
    tail = gelu_tail(z) and the first difference is taken by cases."""
    perturbed = z + d
    relu = tl.where(z > 0.0, tl.where(d < -z, -z, d), tl.where(perturbed < 0.0, 0.0, perturbed))
    return relu - (gelu_tail(perturbed, TANH) - tail)


@triton.jit
def _kernel(
    delta, base, out, P, S, chunks, TANH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)  # chunks of perturbations vary fastest: they share a tile of the base
    first = piece % chunks * (ROWS * STEPS)
    at = piece // chunks * BLOCK + tl.arange(0, BLOCK)
    inside = at < S
    z = tl.load(base + at, mask=inside, other=0.0)
    # For |x| above 15, gelu(x) = max(x, 0) in float32.
    clamped = tl.where(z > 15.0, 15.0, tl.where(z < -15.0, -15.0, z)).to(tl.float64)
    s, tail = _series(clamped, TANH)
    t = tail.to(tl.float32)[None, :]
    term = ()
    for n in tl.static_range(_TERMS):
        term += ((clamped * s[n + 1] + s[n]).to(tl.float32)[None, :],)
    z = z[None, :]
    for step in range(STEPS):
        p = first + step * ROWS + tl.arange(0, ROWS)
        where = p[:, None] * S + at[None, :]
        mask = (p < P)[:, None] & inside[None, :]
        d = tl.load(delta + where, mask=mask, other=0.0).to(tl.float32)
        q = term[_TERMS - 1]
        for n in tl.static_range(_TERMS - 1):
            q = q * d + term[_TERMS - 2 - n]
        tl.store(out + where, tl.where(tl.abs(d) > NEAR, far_change(d, z, t, TANH), q * d), mask=mask)


def run(delta: Tensor, z: Tensor, *, approximate: str, out_dtype: torch.dtype) -> Tensor:
    delta, z = delta.contiguous(), z.contiguous()
    out = torch.empty(delta.shape, dtype=out_dtype, device=delta.device)
    if out.numel() > 0:
        perturbations, size = delta.shape[0], z.numel()
        rows, steps = (4, 4) if perturbations > 1 else (1, 1)
        block = min(256, triton.next_power_of_2(size))
        chunks = triton.cdiv(perturbations, rows * steps)
        _kernel[(triton.cdiv(size, block) * chunks,)](
            delta, z, out, perturbations, size, chunks, TANH=approximate == "tanh", ROWS=rows, STEPS=steps, BLOCK=block,
        )  # fmt: skip
    return out
