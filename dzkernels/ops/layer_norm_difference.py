from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .. import backends
from .._op import BASE, BFLOAT16, FLOAT64, LEAD, WIDE, Arg, Kernel, Op

OP = Op(
    __name__,
    Arg("delta", "P, R, M", LEAD, filled="M"),
    Arg("zc", "R, M", BASE),
    Arg("var", "R", FLOAT64),
    Arg("gamma", "M", WIDE, optional=True),
    cpu=Kernel(BFLOAT16),
    triton=Kernel(BFLOAT16),
)


def layer_norm_difference(
    delta: Tensor,
    zc: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    *,
    eps: float,
    centre: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Change of layer norm, group norm (rows = sample x group) or RMS norm when its input is perturbed.

    d = delta[p, r] - mean(delta[p, r]), dvar = mean(2 zc d + d^2), s = sqrt(var + eps), s' = sqrt(var + dvar + eps)
    out[p, r] = gamma * (d / s' - zc * dvar / (s * s' * (s + s')))
    centre=False (RMS norm): no mean is subtracted; d = delta[p, r], and zc is the input itself

    delta   [P, R, M]
    zc      [R, M]       base input minus its mean over the row, rounded once; float64 for a float64 delta, else float32
    var     [R] float64  mean(zc^2) of the row
    gamma   [M]          weight, float32 or float64; None means 1
    result  [P, R, M]    contiguous

    The result has the dtype of delta unless out_dtype is given.

    Exactness: float32 arithmetic. Moments are float64 sums of float32 sums of at most 8 terms; s' is computed from
    mean((zc + d)^2), which does not cancel. The error of an output is at most

        16 u |gamma| ((|delta| + |mean|) / s' + |zc| m / (s s' (s + s')))    m = mean(2 |zc d| + d^2)

    Another out_dtype costs one more rounding. Squares must not overflow: |delta|, |zc| < 1e18.
    Cost: reads delta once from memory and twice from cache, writes the result.
    """
    OP(delta, zc, var, gamma)
    return backends.run(
        OP.name, delta, delta, zc, var, gamma, eps=check.eps(OP.name, eps), centre=bool(centre),
        out_dtype=check.float_dtype(OP.name, "out_dtype", out_dtype, delta.dtype),
    )  # fmt: skip
