from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._norm import RowNorm
from .._op import BASE, BFLOAT16, LEAD, Arg, Kernel, Op
from ._rows import around, norm_tensors, product_dtypes, taken

OP = Op(
    __name__,
    Arg("delta", "P, R, K", LEAD),
    Arg("weight", "M, K", BASE, filled="M and K"),
    *around("R"),
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
    """Change of a linear layer, with the layer norm before it and the sum after it, when its input moves.

    out[p] = residual[p] + d weight^T
    d = delta[p], or with a norm layer_norm_difference(delta, *norm)[p]

    delta     [P, R, K]  R rows: samples and tokens
    weight    [M, K]     float64 for a float64 delta, else float32
    residual  [P, R, M]  difference that is added, any floating-point dtype; None means 0
    norm      zc [R, K], var [R] float64, gamma [K] or None, eps; None means there is none
    result    [P, R, M]  contiguous

    The result has the dtype of delta unless out_dtype is given, and so have the operands of the product.

    Exactness: float32 arithmetic, on tensor cores the sum of three products of tf32 halves, in any order; there an
    infinity may give NaN. Off by at most K + 16 roundings of |d| |weight|^T and one of the result, besides what d is
    off by; on tensor cores the product of the small halves that is left out, 2^-22, is 4 of the 16, what they are cut
    by 4 more, and a sum in steps of 8 terms the rest. With operands=torch.bfloat16 d and the weight are rounded to it
    once, and sums stay float32.
    Cost: 2 R K M operations a perturbation; reads delta and the residual, writes the result.
    """
    OP(delta, weight, *norm_tensors(OP.name, norm), residual)
    return backends.run(
        OP.name,
        delta,
        delta,
        weight,
        taken(residual, delta),
        norm,
        **product_dtypes(OP.name, delta, operands, out_dtype),
    )
