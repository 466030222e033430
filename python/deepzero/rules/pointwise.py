"""Elementwise ops. Each function returns f(z + dz) - f(z) in a form without cancellation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

import dzkernels

from ..carriers import Zero, occurs
from .registry import align, aten, discrete, pointwise, rule

if TYPE_CHECKING:
    from ..block import Block

# --- sums and products. da or db is None where that operand does not move.


def _nothing(*_: Any, **__: Any) -> tuple[()]:
    return ()


@pointwise(aten.add.Tensor, aten.add.Scalar, arity=2, saves=_nothing, half=True)
def add(da: Tensor | None, db: Tensor | None, *_: Any, alpha: float = 1) -> Tensor:
    scaled = db if db is None or alpha == 1 else alpha * db
    return _sum(da, scaled)


@pointwise(aten.sub.Tensor, aten.sub.Scalar, arity=2, saves=_nothing)
def sub(da: Tensor | None, db: Tensor | None, *_: Any, alpha: float = 1) -> Tensor:
    return _sum(da, None if db is None else -alpha * db)


def _sum(da: Tensor | None, db: Tensor | None) -> Tensor:
    if da is None or db is None:
        return da if db is None else db  # type: ignore[return-value]
    return da + db if db.dtype is not torch.bfloat16 else da + db.float()


@pointwise(aten.rsub.Scalar, arity=1, saves=_nothing)
def rsub(da: Tensor, *_: Any) -> Tensor:
    return -da


@pointwise(aten.neg.default, saves=_nothing)
def neg(da: Tensor) -> Tensor:
    return -da


@pointwise(aten.mul.Tensor, aten.mul.Scalar, arity=2)
def mul(da: Tensor | None, db: Tensor | None, a: Any, b: Any) -> Tensor:
    if db is None:
        return da * b  # type: ignore[operator]
    if da is None:
        return a * db
    return a * db + da * (b + db)


@pointwise(aten.div.Tensor, aten.div.Scalar, arity=2)
def div(da: Tensor | None, db: Tensor | None, a: Any, b: Any) -> Tensor:
    if db is None:
        return da / b  # type: ignore[operator]
    top = -(a * db) if da is None else da * b - a * db
    return top / (b * (b + db))


@pointwise(aten.reciprocal.default)
def reciprocal(dz: Tensor, z: Tensor) -> Tensor:
    return -dz / (z * (z + dz))


@pointwise(aten.addcmul.default, arity=3)
def addcmul(
    da: Tensor | None, db: Tensor | None, dc: Tensor | None, a: Any, b: Any, c: Any, *, value: float = 1
) -> Tensor:
    return _sum(da, None if db is None and dc is None else value * mul(db, dc, b, c))


@pointwise(aten.lerp.Scalar, arity=2, saves=_nothing)
def lerp(da: Tensor | None, db: Tensor | None, weight: float) -> Tensor:
    return _sum(None if da is None else (1 - weight) * da, None if db is None else weight * db)


# --- powers and roots


@pointwise(aten.pow.Tensor_Scalar)
def power(dz: Tensor, z: Tensor, n: float) -> Tensor:
    """(z + dz)^n - z^n: polynomials for small whole n, difference of roots for halves, else expm1(n log1p(dz / z))."""
    if n in (0.5, -0.5):
        return sqrt(dz, z) if n > 0 else rsqrt(dz, z)
    if n < 0 and float(n).is_integer():
        dp, p = power(dz, z, -n), z ** (-n)
        return -dp / (p * (p + dp))
    if float(n).is_integer() and n <= 16:
        total = torch.zeros_like(dz)  # a^n - b^n = (a - b) * sum_k a^(n-1-k) b^k, evaluated by Horner's rule
        moved, rest = z + dz, torch.ones_like(z)
        for _ in range(int(n)):
            total = total * moved + rest
            rest = rest * z
        return dz * total
    ratio = dz / z
    smooth = torch.special.expm1(n * torch.log1p(ratio)) * z**n
    return torch.where(ratio.abs() < 1e6, smooth, (z + dz) ** n - z**n)  # from zero or nearly: nothing cancels


@pointwise(aten.pow.Tensor_Tensor, arity=2, exact=True)
def power_of_tensor(da: Tensor | None, db: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """a^b expm1((b + db) log1p(da / a) + db log a) where a stays positive, else plainly: there only whole b exist."""
    da, db = (torch.zeros_like(base) if d is None else d for d, base in ((da, a), (db, b)))
    smooth = a**b * torch.expm1((b + db) * torch.log1p(da / a) + db * a.log())
    return torch.where((a > 0) & (a + da > 0), smooth, (a + da) ** (b + db) - a**b)


@pointwise(aten.pow.Scalar, arity=2, exact=True)
def power_of_number(da: None, db: Tensor, a: float, b: Tensor) -> Tensor:
    if a <= 0:
        return a ** (b + db) - a**b
    return a**b * torch.expm1(db * math.log(a))


@pointwise(aten.hypot.default, arity=2)
def hypot(da: Tensor | None, db: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    grown = _sum(None if da is None else da * (2 * a + da), None if db is None else db * (2 * b + db))
    bottom = torch.hypot(a, b) + torch.hypot(a if da is None else a + da, b if db is None else b + db)
    return torch.where(grown == 0, 0.0, grown / bottom)


@pointwise(aten.sqrt.default)
def sqrt(dz: Tensor, z: Tensor) -> Tensor:
    bottom = (z + dz).sqrt() + z.sqrt()
    return torch.where(dz == 0, 0.0, dz / bottom)  # sqrt(0 + 0) - sqrt(0) is 0, not 0 / 0


@pointwise(aten.rsqrt.default)
def rsqrt(dz: Tensor, z: Tensor) -> Tensor:
    a, b = (z + dz).sqrt(), z.sqrt()
    return -dz / (a * b * (a + b))


# --- exponentials and logarithms


@pointwise(aten.exp.default, aten.expm1.default, saves=lambda z: z.exp())
def exp(dz: Tensor, ez: Tensor) -> Tensor:
    return ez * torch.expm1(dz)


@pointwise(aten.exp2.default, saves=lambda z: z.exp2())
def exp2(dz: Tensor, ez: Tensor) -> Tensor:
    return ez * torch.expm1(dz * math.log(2))


@pointwise(aten.log.default)
def log(dz: Tensor, z: Tensor) -> Tensor:
    return torch.log1p(dz / z)


@pointwise(aten.log2.default)
def log2(dz: Tensor, z: Tensor) -> Tensor:
    return torch.log1p(dz / z) / math.log(2)


@pointwise(aten.log10.default)
def log10(dz: Tensor, z: Tensor) -> Tensor:
    return torch.log1p(dz / z) / math.log(10)


@pointwise(aten.log1p.default, saves=lambda z: 1 + z)
def log1p(dz: Tensor, one_plus: Tensor) -> Tensor:
    return torch.log1p(dz / one_plus)


@pointwise(aten.sigmoid.default)
def sigmoid(dz: Tensor, z: Tensor) -> Tensor:
    """s(b) - s(a) = -expm1(-(b - a)) s(b) s(-a) for b >= a, and with the roles swapped below it."""
    moved = z + dz
    up, low = torch.maximum(z, moved), torch.minimum(z, moved)
    return -dz.sign() * torch.expm1(-dz.abs()) * up.sigmoid() * (-low).sigmoid()


@pointwise(aten.tanh.default)
def tanh(dz: Tensor, z: Tensor) -> Tensor:
    return 2 * sigmoid(2 * dz, 2 * z)


@pointwise(aten.silu.default)
def silu(dz: Tensor, z: Tensor) -> Tensor:
    return dz * (z + dz).sigmoid() + z * sigmoid(dz, z)


@pointwise(aten.sin.default)
def sin(dz: Tensor, z: Tensor) -> Tensor:
    return 2 * (z + dz / 2).cos() * (dz / 2).sin()


@pointwise(aten.cos.default)
def cos(dz: Tensor, z: Tensor) -> Tensor:
    return -2 * (z + dz / 2).sin() * (dz / 2).sin()


@pointwise(aten.sinh.default)
def sinh(dz: Tensor, z: Tensor) -> Tensor:
    return 2 * (z + dz / 2).cosh() * (dz / 2).sinh()


@pointwise(aten.cosh.default)
def cosh(dz: Tensor, z: Tensor) -> Tensor:
    return 2 * (z + dz / 2).sinh() * (dz / 2).sinh()


@pointwise(aten.atan.default)
def atan(dz: Tensor, z: Tensor) -> Tensor:
    """atan b - atan a = atan2(b - a, 1 + a b), which also holds across the pole of the tangent."""
    return torch.atan2(dz, 1 + z * (z + dz))


@pointwise(aten.atan2.default, arity=2, exact=True)
def atan2(dy: Tensor | None, dx: Tensor | None, y: Tensor, x: Tensor) -> Tensor:
    """The angle between the old and the new vector, and a full turn where it crosses the negative axis."""
    y2, x2 = (y if dy is None else y + dy), (x if dx is None else x + dx)
    cross = _sum(None if dy is None else x * dy, None if dx is None else -y * dx)
    angle = torch.atan2(cross, x * x2 + y * y2)
    turns = torch.round((torch.atan2(y2, x2) - torch.atan2(y, x) - angle) / (2 * math.pi))
    return angle + 2 * math.pi * turns


@pointwise(aten.tan.default)
def tan(dz: Tensor, z: Tensor) -> Tensor:
    return dz.sin() / (z.cos() * (z + dz).cos())


def _with_rest(z: Tensor) -> tuple[Tensor, Tensor]:
    return z, 1 - z * z


@pointwise(aten.asin.default, saves=_with_rest)
def asin(dz: Tensor, z: Tensor, rest: Tensor) -> Tensor:
    """sin(b - a) = sin b cos a - cos b sin a, as a quotient where the two products have the same sign."""
    moved, before, after = z + dz, rest.sqrt(), (rest - dz * (2 * z + dz)).sqrt()
    apart = torch.where(
        z * moved > 0,
        dz * (moved + z) / (moved * before + z * after),
        moved * before - z * after,
    )
    return torch.atan2(apart, before * after + z * moved)


@pointwise(aten.acos.default, saves=_with_rest)
def acos(dz: Tensor, z: Tensor, rest: Tensor) -> Tensor:
    return -asin(dz, z, rest)


@pointwise(aten.asinh.default)
def asinh(dz: Tensor, z: Tensor) -> Tensor:
    moved = z + dz
    before, after = (1 + z * z).sqrt(), (1 + moved * moved).sqrt()
    same = dz * (moved + z) / (moved * before + z * after)
    return torch.asinh(torch.where(z * moved > 0, same, moved * before - z * after))


@pointwise(aten.acosh.default, saves=lambda z: (z, (z - 1) * (z + 1)))
def acosh(dz: Tensor, z: Tensor, over: Tensor) -> Tensor:
    moved = z + dz
    grown = dz * (moved + z)
    return torch.asinh(torch.where(dz == 0, 0.0, grown / (z * (over + grown).sqrt() + moved * over.sqrt())))


@pointwise(aten.atanh.default, saves=_with_rest)
def atanh(dz: Tensor, z: Tensor, rest: Tensor) -> Tensor:
    return torch.atanh(dz / (rest - z * dz))


# --- smooth functions without such an identity: quadrature of the derivative over [z, z + dz]

_NODES = (0.06943184420297371, 0.33000947820757187, 0.66999052179242813, 0.93056815579702629)
_WEIGHTS = (0.17392742256872693, 0.32607257743127307, 0.32607257743127307, 0.17392742256872693)


def quadrature(dz: Tensor, z: Tensor, f: Callable[[Tensor], Tensor], df: Callable[[Tensor], Tensor]) -> Tensor:
    """f(z + dz) - f(z) by 4-point Gauss-Legendre of f' (error of order dz^9); plainly in float64 where dz is large.

    Large is where the plain form loses less than the quadrature: 1/4 in float32, 1/64 in float64.
    """
    total = sum(w * df(z + t * dz) for t, w in zip(_NODES, _WEIGHTS, strict=True))
    out = dz * total
    far = dz.abs() > (0.25 if dz.dtype is torch.float32 else 1 / 64)
    if occurs(far):
        out = torch.where(far, (f(z.double() + dz.double()) - f(z.double())).to(dz.dtype), out)
    return out


@pointwise(aten.gelu.default, half=True)
def gelu(dz: Tensor, z: Tensor, *, approximate: str = "none") -> Tensor:
    """By dzkernels, which take one base for all perturbations; a channel's base differs between them."""
    dz = dz.to(z.dtype) if dz.dtype is torch.float64 else dz
    if z.dim() == dz.dim():
        return dzkernels.gelu_difference(dz[None], z.expand_as(dz), approximate=approximate)[0]
    return dzkernels.gelu_difference(dz, z.expand(dz.shape[1:]), approximate=approximate)


@pointwise(aten.erf.default)
def erf(dz: Tensor, z: Tensor) -> Tensor:
    return quadrature(dz, z, torch.erf, lambda x: torch.exp(-x * x) * (2 / math.sqrt(math.pi)))


@pointwise(aten.softplus.default)
def softplus(dz: Tensor, z: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """log(1 + e^(b + db)) - log(1 + e^b) = log1p(sigmoid(b) expm1(db)), and linear above the threshold.

    torch's softplus jumps by log1p(e^-threshold) to the identity there; at its default that is 2e-9.
    """
    b, db = beta * z, beta * dz
    up, down = db.clamp(min=0), db.clamp(max=0)
    smooth = torch.where(
        db >= 0,
        up + torch.log1p((-b).sigmoid() * torch.expm1(-up)),
        torch.log1p(b.sigmoid() * torch.expm1(down)),
    )
    return torch.where((b > threshold) & (b + db > threshold), db, smooth) / beta


@pointwise(aten.elu.default)
def elu(dz: Tensor, z: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    """Linear above zero, alpha expm1(input_scale z) below; a crossing is the sum of the two parts."""
    above = relu(dz, z)
    low, moved = z.clamp(max=0) * input_scale, (z + dz).clamp(max=0) * input_scale
    below = torch.exp(low) * torch.expm1(torch.where((z <= 0) & (z + dz <= 0), dz * input_scale, moved - low))
    return scale * above + scale * alpha * below


@pointwise(aten.erfc.default)
def erfc(dz: Tensor, z: Tensor) -> Tensor:
    return quadrature(dz, z, torch.erfc, lambda x: torch.exp(-x * x) * (-2 / math.sqrt(math.pi)))


# --- functions with kinks, by cases


@pointwise(aten.relu.default, saves=lambda z: (z.clamp(max=0), -z.clamp(min=0)))
def relu_saved(dz: Tensor, below: Tensor, floor: Tensor) -> Tensor:
    """max(z + dz, 0) - max(z, 0): at most back down to zero from above, at most what is left over from below."""
    return torch.maximum(below + dz, floor)


def relu(dz: Tensor, z: Tensor) -> Tensor:
    return relu_saved(dz, z.clamp(max=0), -z.clamp(min=0))


@pointwise(aten.leaky_relu.default)
def leaky_relu(dz: Tensor, z: Tensor, slope: float = 0.01) -> Tensor:
    above = relu(dz, z)
    return above + slope * (dz - above)


@pointwise(aten.abs.default)
def absolute(dz: Tensor, z: Tensor) -> Tensor:
    above = relu(dz, z)
    return 2 * above - dz


def _gaps(z: Tensor, low: Any = None, high: Any = None) -> tuple[Tensor, Any, Any]:
    """How far z lies outside [low, high], and how far the clamped z may still move down and up."""
    clamped = z.clamp(low, high) if low is not None or high is not None else z
    inf = torch.tensor(math.inf, dtype=z.dtype, device=z.device)
    down = -inf if low is None else torch.minimum(low - clamped, torch.zeros_like(z))
    return z - clamped, down, inf if high is None else high - clamped


@pointwise(aten.clamp.default, aten.hardtanh.default, saves=_gaps)
def clamp(dz: Tensor, gap: Tensor, down: Tensor, up: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.minimum(torch.maximum(gap + dz, down), up)


@pointwise(aten.clamp_min.default, saves=lambda z, low: _gaps(z, low)[:2])
def clamp_min(dz: Tensor, gap: Tensor, down: Tensor, _: Any) -> Tensor:
    return torch.maximum(gap + dz, down)


def _below(a: Any, b: Any) -> tuple[Any, Any]:
    top = torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    return a - top, b - top


def _above(a: Any, b: Any) -> tuple[Any, Any]:
    bottom = torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return a - bottom, b - bottom


@pointwise(aten.maximum.default, arity=2, saves=_below)
def maximum(da: Tensor | None, db: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a if da is None else a + da, b if db is None else b + db)


@pointwise(aten.minimum.default, arity=2, saves=_above)
def minimum(da: Tensor | None, db: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(a if da is None else a + da, b if db is None else b + db)


def _bounds(z: Tensor, low: Any = None, high: Any = None) -> tuple[Tensor, ...]:
    """The pairs of min(max(z, low), high), each measured from its winner."""
    inf = torch.tensor(math.inf, dtype=z.dtype, device=z.device)
    raised = z if low is None else torch.maximum(z, low)
    return (*_below(z, -inf if low is None else low), *_above(raised, inf if high is None else high))


@pointwise(aten.clamp.Tensor, arity=3, saves=_bounds)
def clamp_tensor(*moving: Any) -> Tensor:
    """Differences of z and of the bounds that are given, then z and low, and max(z, low) and high."""
    dz, dl, dh = (*moving[:-4], None, None)[:3]
    z, low, raised, high = moving[-4:]
    lifted = None if dz is None and dl is None else maximum(dz, dl, z, low)
    return minimum(lifted, dh, raised, high)


@rule(aten.rrelu_with_noise_functional.default, family="pointwise")
def rrelu(block: Block, node: fx.Node) -> Any:
    """A leaky ReLU outside of training. In training the draws depend on the inputs' signs and cannot be reused."""
    x, _, lower, upper, training = (*node.args, *(0.125, 1 / 3, False)[len(node.args) - 2 :])[:5]
    if training:
        return block.fallback(node)
    diffs, bases, wrap = align(block, (x,), (block.low(x),), tuple(block.exact(x).shape), block.d)
    return wrap(leaky_relu(*diffs, *bases, (lower + upper) / 2)), Zero  # type: ignore[operator]


@pointwise(aten.where.self, arity=3, exact=True)
def where(dc: Tensor | None, da: Tensor | None, db: Tensor | None, c: Any, a: Any, b: Any) -> Tensor:
    """By cases of the old and the new condition; a difference of the two branches only where it switches."""
    before = c != 0
    after = before if dc is None else (c + dc) != 0
    zero = torch.zeros((), dtype=torch.float64, device=before.device)
    stay_a, stay_b = (zero if d is None else d for d in (da, db))
    stay = torch.where(before, stay_a, stay_b)
    if dc is None:
        return stay
    jump = torch.where(before, b + stay_b - a, a + stay_a - b)
    return torch.where(after == before, stay, jump)


# --- piecewise constant

discrete(aten.sign.default, aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default)
discrete(aten.logical_not.default, aten.bitwise_not.default, aten.isnan.default, aten.isinf.default)
discrete(aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default, arity=2)
discrete(aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor, arity=2)
discrete(aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor, arity=2)
discrete(aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar)
discrete(aten.div.Tensor_mode, aten.floor_divide.default, arity=2)
discrete(aten.sgn.default, aten.signbit.default, aten.round.decimals)


@pointwise(aten.remainder.Scalar, aten.remainder.Tensor, arity=2, exact=True)
def remainder(da: Tensor | None, db: Tensor | None, a: Any, b: Any) -> Tensor:
    """a - b floor(a / b): the difference moves with a except where the quotient's floor jumps."""
    return _modulo(torch.floor, da, db, a, b)


@pointwise(aten.fmod.Scalar, aten.fmod.Tensor, arity=2, exact=True)
def fmod(da: Tensor | None, db: Tensor | None, a: Any, b: Any) -> Tensor:
    return _modulo(torch.trunc, da, db, a, b)


def _modulo(cut: Callable[[Tensor], Tensor], da: Tensor | None, db: Tensor | None, a: Any, b: Any) -> Tensor:
    moved = b if db is None else b + db
    before = cut(torch.as_tensor(a / b))
    after = cut(torch.as_tensor((a if da is None else a + da) / moved))
    jump = moved * (before - after)
    smooth = [d for d in (da, None if db is None else -before * db) if d is not None]
    return sum(smooth, jump)
