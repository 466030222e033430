"""Device functions shared by the kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1_wide(x):
    """exp(x) - 1 in float64 for x <= 700, with an error of about 2 ulps. NaN stays NaN."""
    x = tl.where(x < -708.0, -708.0, x)
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10  # log 2 in two parts
    # Taylor series of (exp(r) - 1 - r) / r^2; |r| <= 0.347, so the first omitted term is below 1e-18 of the sum.
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
    """log(1 + x) in float64 for x > -1/2: the logarithm of the rounded sum, corrected for the rounding."""
    u = 1.0 + x
    return tl.log(u) - ((u - 1.0) - x) / u


@triton.jit
def relu_change(y, dy):
    """max(y + dy, 0) - max(y, 0) without cancellation, as max(min(y, 0) + dy, -max(y, 0)). NaN stays NaN."""
    change = tl.where(y > 0, 0.0, y) + dy
    bound = tl.where(y > 0, -y, 0.0)
    return tl.where(change < bound, bound, change)


@triton.jit
def max_of(a, b):
    """The maximum; NaN if either is NaN."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def norm_moments(e1, e2, ze, shift, count, before):
    """(mean of d, change of the variance, new variance + eps) in float64, from the sums of e = d - shift, e^2 and zc e.
    `before` is the old variance + eps."""
    mean_e = e1 / count
    dvar = (2.0 * ze + e2) / count - mean_e * mean_e
    return shift.to(tl.float64) + mean_e, dvar, before + dvar


@triton.jit
def norm_coefficients(mean_d, dvar, before, after, gamma):
    """(shift, scale, zc_scale, offset) in float32, the coefficients of the change of the norm's output,
    scale (d - shift) - (zc_scale zc + offset)."""
    s, t = tl.sqrt(before), tl.sqrt(after)
    scale = gamma / t
    shift = mean_d.to(tl.float32)
    zc_scale = gamma * dvar / (s * t * (s + t))
    offset = scale * (mean_d - shift.to(tl.float64))
    return shift, scale.to(tl.float32), zc_scale.to(tl.float32), offset.to(tl.float32)
