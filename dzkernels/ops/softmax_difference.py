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
    """Change of softmax, or of log-softmax, when its input is perturbed.

    out[q, r, k] = p[r, k] * expm1(delta[q, r, k] - m), with log: delta[q, r, k] - m
    m = log(sum_k p[r, k] exp(delta[q, r, k])) = log1p(sum_k p[r, k] expm1(delta[q, r, k])), as each row of p sums to 1

    delta   [P, R, K]  its value does not matter where p is 0; without log the result there is exactly 0
    p       [R, K]     base softmax, rounded once; float64 for a float64 delta, else float32
    result  [P, R, K]  contiguous, dtype of delta

    Exactness: sums are float64 sums of float32 sums of at most 8 terms. With x = expm1(delta) and X = sum_k p |x| the
    error is at most

        softmax      24 u p (|x| + X) / exp(m)
        log-softmax  24 u (|delta| + |m| + X / exp(m))

    Where exp(m) < 1/2 or a delta exceeds 60 the row is computed in float64, with p divided by its sum: the result is
    rounded once.
    Cost: one exponential per element; reads delta, writes the result.
    """
    OP(delta, p)
    return backends.run(OP.name, delta, delta, p, log=bool(log))
