from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .. import backends
from .._op import BASE, BFLOAT16, LEAD, Arg, Kernel, Op

OP = Op(
    __name__,
    Arg("delta", "P, *s", LEAD),
    Arg("z", "*s", BASE),
    cpu=Kernel(BFLOAT16),
    triton=Kernel(BFLOAT16),
)


def gelu_difference(
    delta: Tensor, z: Tensor, *, approximate: str = "none", out_dtype: torch.dtype | None = None
) -> Tensor:
    """Change of GELU when its input is perturbed.

    out[p] = gelu(z + delta[p]) - gelu(z), approximate as in torch.nn.functional.gelu: "none" or "tanh"
    computed as a Taylor series in delta; where |delta| > 1/4 as (max(z + d, 0) - max(z, 0)) - (t(z + d) - t(z)), where
    gelu(x) = max(x, 0) - t(x) and t is bounded

    delta   [P, *s]  any s
    z       [*s]     base input, float64 for a float64 delta, else float32
    result  [P, *s]  contiguous

    The result has the dtype of delta unless out_dtype is given.

    Exactness: float32 arithmetic. The error is at most 6 u 1.13 |delta| for any delta; 1.13 is the largest slope of
    GELU. Another out_dtype costs one more rounding.
    Cost: the coefficients of z once for all P; then reads delta and writes the result, bound by memory bandwidth.
    """
    OP(delta, z)
    return backends.run(
        OP.name, delta, delta, z, approximate=check.form_of_gelu(OP.name, approximate),
        out_dtype=check.float_dtype(OP.name, "out_dtype", out_dtype, delta.dtype),
    )  # fmt: skip
