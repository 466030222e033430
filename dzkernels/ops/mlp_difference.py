from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .. import backends
from .._norm import RowNorm
from .._op import BASE, BFLOAT16, LEAD, Arg, Kernel, Op
from ._rows import kernel_residual, norm_and_residual, norm_tensors, product_dtypes

OP = Op(
    __name__,
    Arg("delta", "P, R, K", LEAD),
    Arg("up", "H, K", BASE, filled="H and K"),
    Arg("z", "R, H", BASE),
    Arg("down", "M, H", BASE, filled="M and H"),
    *norm_and_residual("R"),
    cpu=Kernel(BFLOAT16),
    triton=Kernel(BFLOAT16),
)


def mlp_difference(
    delta: Tensor,
    up: Tensor,
    z: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
    norm: RowNorm | None = None,
    *,
    approximate: str = "none",
    operands: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Change of a transformer's feed-forward layer (linear, GELU, linear) when its input is perturbed.

    out[p] = residual[p] + (gelu(z + d up^T) - gelu(z)) down^T, the change of GELU as in gelu_difference
    d = delta[p], or with a norm layer_norm_difference(delta, *norm)[p]

    delta     [P, R, K]  R rows: samples and tokens
    up        [H, K]     weight of the first linear layer, float64 for a float64 delta, else float32
    z         [R, H]     base input of GELU, of the dtype of up
    down      [M, H]     weight of the second linear layer, of the dtype of up
    residual  [P, R, M]  difference to add, any floating-point dtype; None means 0
    norm      zc [R, K], var [R] float64, gamma [K] or None, eps; None means no norm
    result    [P, R, M]  contiguous

    The operands of the two products and the result have the dtype of delta unless operands or out_dtype is given.

    Exactness: products as in linear_difference. Besides the error of d and one rounding of the result, the error is at
    most the sum of, with a = |d| |up|^T,

        1.13 (K + 22) u a |down|^T    the first product (K + 16) and the change of GELU (6)
        1.13 (H + 16) u a |down|^T    the second product

    With operands=torch.bfloat16 d, the weights and the change of GELU are rounded to bfloat16 once, and sums stay in
    float32.
    Cost: 2 R H (K + M) operations per perturbation. The hidden layer stays in cache; meant for weights that fit there
    too.
    """
    OP(delta, up, z, down, *norm_tensors(OP.name, norm), residual)
    form, options = check.form_of_gelu(OP.name, approximate), product_dtypes(OP.name, delta, operands, out_dtype)
    residual = kernel_residual(residual, delta)
    return backends.run(OP.name, delta, delta, up, z, down, residual, norm, approximate=form, **options)
