from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .. import backends
from .._norm import RowNorm
from .._op import BASE, BFLOAT16, LEAD, Arg, Kernel, Op
from ._rows import around, norm_tensors, product_dtypes, taken

OP = Op(
    __name__,
    Arg("delta", "P, R, K", LEAD),
    Arg("up", "H, K", BASE, filled="H and K"),
    Arg("z", "R, H", BASE),
    Arg("down", "M, H", BASE, filled="M and H"),
    *around("R"),
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
    """Change of a transformer's feed-forward layer, linear, GELU, linear, when its input moves.

    out[p] = residual[p] + (gelu(z + d up^T) - gelu(z)) down^T, the change of GELU as in gelu_difference
    d = delta[p], or with a norm layer_norm_difference(delta, *norm)[p]

    delta     [P, R, K]  R rows: samples and tokens
    up        [H, K]     weight of the first linear layer, float64 for a float64 delta, else float32
    z         [R, H]     base input of GELU, likewise
    down      [M, H]     weight of the second, likewise
    residual  [P, R, M]  difference that is added, any floating-point dtype; None means 0
    norm      zc [R, K], var [R] float64, gamma [K] or None, eps; None means there is none
    result    [P, R, M]  contiguous

    The result has the dtype of delta unless out_dtype is given, and so have the operands of the two products.

    Exactness: products as in linear_difference. With a = |d| |up|^T off by at most 1.13 (K + 22) roundings of
    a |down|^T, H + 16 roundings of 1.13 a |down|^T, and one of the result, besides what d is off by. With
    operands=torch.bfloat16 d, the weights and the change of GELU are rounded to it once, and sums stay float32.
    Cost: 2 R H (K + M) operations a perturbation; the hidden layer stays in cache. Meant for weights that do so too.
    """
    OP(delta, up, z, down, *norm_tensors(OP.name, norm), residual)
    form, options = check.form_of_gelu(OP.name, approximate), product_dtypes(OP.name, delta, operands, out_dtype)
    return backends.run(OP.name, delta, delta, up, z, down, taken(residual, delta), norm, approximate=form, **options)
