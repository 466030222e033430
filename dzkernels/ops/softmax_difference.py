from __future__ import annotations

from torch import Tensor

from .. import backends
from .._op import BASE, LEAD, Arg, Kernel, Op

OP = Op(
    __name__,
    Arg("delta", "P, R, K", LEAD, filled="K"),
    Arg("p", "R, K", BASE),
    cpu=Kernel(result="P, R, K"),
    triton=Kernel(),
)


def softmax_difference(delta: Tensor, p: Tensor, *, log: bool = False) -> Tensor:
    """Change of softmax, or of log-softmax, when its input moves.

    out[q, r, k] = p[r, k] * expm1(delta[q, r, k] - m), with log: delta[q, r, k] - m
    m = log(sum_k p[r, k] exp(delta[q, r, k])) = log1p(sum_k p[r, k] expm1(delta[q, r, k])), as each row of p sums to 1

    delta   [P, R, K]  where p is 0 its value has no influence, and without log the result there is exactly 0
    p       [R, K]     base softmax, rounded once; float64 for a float64 delta, else float32
    result  [P, R, K]  contiguous, dtype of delta

    Exactness: with x = expm1(delta) and X = sum_k p |x|, off by at most 24 roundings of p (|x| + X) / exp(m), with log
    of |delta| + |m| + X / exp(m); sums of at most 8 float32 terms a lane that go on in float64. Where exp(m) < 1/2 or a
    delta is over 60, float64 throughout with p divided by its sum: one rounding of the result.
    Cost: one exponential an element; reads delta, writes the result.
    """
    OP(delta, p)
    return backends.run(OP.name, delta, delta, p, log=bool(log))
