"""What the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1_wide(x):
    """exp(x) - 1 in float64 to about two units in the last place for x <= 700. NaN stays NaN."""
    x = tl.where(x < -708.0, -708.0, x)
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10  # log 2 in two parts
    # Taylor series of (exp(r) - 1 - r) / r^2; |r| <= 0.347, so the first term left out is below 1e-18 of the sum.
    q = r * (1.0 / 1307674368000.0) + 1.0 / 87178291200.0
    q = q * r + 1.0 / 6227020800.0
    q = q * r + 1.0 / 479001600.0
    q = q * r + 1.0 / 39916800.0
    q = q * r + 1.0 / 3628800.0
    q = q * r + 1.0 / 362880.0
    q = q * r + 1.0 / 40320.0
    q = q * r + 1.0 / 5040.0
    q = q * r + 1.0 / 720.0
    q = q * r + 1.0 / 120.0
    q = q * r + 1.0 / 24.0
    q = q * r + 1.0 / 6.0
    q = q * r + 0.5
    small = r + r * r * q
    scale = ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)  # 2^k
    return small * scale + (scale - 1.0)


@triton.jit
def log1p_wide(x):
    """log(1 + x) in float64 for x > -1/2: the logarithm of the rounded sum, and what the rounding took off."""
    u = 1.0 + x
    return tl.log(u) - ((u - 1.0) - x) / u


@triton.jit
def relu_change(y, dy):
    """max(y + dy, 0) - max(y, 0) without subtracting the two: one of the two terms of the sum is 0. NaN stays NaN."""
    moved = tl.where(y > 0, 0.0, y) + dy
    least = tl.where(y > 0, -y, 0.0)
    return tl.where(moved < least, least, moved)


@triton.jit
def larger(a, b):
    """The larger one; NaN stays NaN."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def moved_norm(e1, e2, ze, shift, count, before):
    """From the sums of e = d - shift, e^2 and zc e: the mean of d, the change of the variance, and the new variance
    plus eps, all float64."""
    mean_e = e1 / count
    dvar = (2.0 * ze + e2) / count - mean_e * mean_e
    return shift.to(tl.float64) + mean_e, dvar, before + dvar


@triton.jit
def norm_coefficients(mean_d, dvar, before, after, gamma):
    """(shift, scale, pull, offset) with change = scale (d - shift) - (pull zc + offset), rounded to float32."""
    s, t = tl.sqrt(before), tl.sqrt(after)
    scale = gamma / t
    shift = mean_d.to(tl.float32)
    pull = gamma * dvar / (s * t * (s + t))
    offset = scale * (mean_d - shift.to(tl.float64))
    return shift, scale.to(tl.float32), pull.to(tl.float32), offset.to(tl.float32)
