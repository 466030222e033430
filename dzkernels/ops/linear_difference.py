from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._norm import RowNorm
from .._op import BASE, BFLOAT16, LEAD, Arg, Kernel, Op
from ._rows import kernel_residual, norm_and_residual, norm_tensors, product_dtypes

OP = Op(
    __name__,
    Arg("delta", "P, R, K", LEAD),
    Arg("weight", "M, K", BASE, filled="M and K"),
    *norm_and_residual("R"),
    cpu=Kernel(BFLOAT16),
    triton=Kernel(BFLOAT16),
)


def linear_difference(
    delta: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    norm: RowNorm | None = None,
    *,
    operands: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Change of a linear layer, with the layer norm before it and the residual after it, when its input is perturbed.

    out[p] = residual[p] + d weight^T
    d = delta[p], or with a norm layer_norm_difference(delta, *norm)[p]

    delta     [P, R, K]  R rows: samples and tokens
    weight    [M, K]     float64 for a float64 delta, else float32
    residual  [P, R, M]  difference to add, any floating-point dtype; None means 0
    norm      zc [R, K], var [R] float64, gamma [K] or None, eps; None means no norm
    result    [P, R, M]  contiguous

    The operands of the product and the result have the dtype of delta unless operands or out_dtype is given.

    Exactness: float32 arithmetic. Tensor cores multiply operands split into two tf32, as three products; there an
    infinity may give NaN. The error of the product is at most (K + 16) u |d| |weight|^T, besides the error of d and one
    rounding of the result:

        K    float32 sum of K products in any order
        4    tensor cores: the product of the two remainders is omitted (2^-22)
        4    tensor cores: the remainders are cut to tf32
        8    tensor cores: a product is summed in steps of 8 terms

    With operands=torch.bfloat16 d and the weight are rounded to bfloat16 once, and sums stay in float32.
    Cost: 2 R K M operations per perturbation; reads delta and the residual, writes the result.
    """
    OP(delta, weight, *norm_tensors(OP.name, norm), residual)
    return backends.run(
        OP.name,
        delta,
        delta,
        weight,
        kernel_residual(residual, delta),
        norm,
        **product_dtypes(OP.name, delta, operands, out_dtype),
    )
