from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._norm import RowNorm
from .._op import BASE, BFLOAT16, LEAD, Arg, Kernel, Op
from ._rows import around, norm_tensors, product_dtypes, taken

OP = Op(
    __name__,
    Arg("delta", "P, N T, K", LEAD, filled="K"),
    Arg("weight", "H, 2 D + E, K", BASE),
    Arg("q", "N, H, T, D", BASE, filled="H and D"),
    Arg("k", "N, H, T, D", BASE),
    Arg("v", "N, H, T, E", BASE, filled="E"),
    Arg("p", "N, H, T, T", BASE),
    Arg("project", "M, H E", BASE, filled="M"),
    *around("N T"),
    cpu=Kernel(BFLOAT16),
    triton=Kernel(BFLOAT16, note="three kernels, one after the other"),
)


def self_attention_difference(
    delta: Tensor,
    weight: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    project: Tensor,
    residual: Tensor | None = None,
    norm: RowNorm | None = None,
    *,
    scale: float,
    operands: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Change of a transformer's self-attention, linear, attention, linear, when its input moves.

    out[p] = residual[p] + attended[p] project^T, the heads of attended side by side
    attended = attention_difference(dq, dk, dv, q, k, v, p, scale) where [dq, dk, dv] = d weight[h]^T for head h
    d = delta[p], or with a norm layer_norm_difference(delta, *norm)[p]

    delta     [P, N T, K]     N samples of T tokens
    weight    [H, 2 D + E, K] of the layers that make queries, keys and values: for every head D rows of queries, D of
                              keys, E of values; float64 for a float64 delta, else float32
    q, k      [N, H, T, D]    base queries and keys, likewise
    v         [N, H, T, E]    base values, likewise
    p         [N, H, T, T]    base attention, rounded once, likewise; where it is 0 (masked) it stays exactly 0
    project   [M, H E]        weight of the layer after the attention, likewise
    residual  [P, N T, M]     difference that is added, any floating-point dtype; None means 0
    norm      zc [N T, K], var [N T] float64, gamma [K] or None, eps; None means there is none
    result    [P, N T, M]     contiguous

    The result has the dtype of delta unless out_dtype is given, and so have the linear layers' operands.

    Exactness: as linear_difference, attention_difference and linear_difference one after the other, in float32. With
    operands=torch.bfloat16 d, the weights and the change of the attention are rounded to it once; sums and the
    attention itself stay float32.
    Cost: 2 N T H (K (2 D + E) + 2 T (D + E) + E M) operations a perturbation; what lies between delta and the result
    stays in cache. Meant for weights that do so too.
    """
    OP(delta, weight, q, k, v, p, project, *norm_tensors(OP.name, norm), residual)
    options = {"scale": float(scale), **product_dtypes(OP.name, delta, operands, out_dtype)}
    return backends.run(OP.name, delta, delta, weight, q, k, v, p, project, taken(residual, delta), norm, **options)
