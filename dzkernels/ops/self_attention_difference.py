from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._norm import RowNorm
from .._op import BASE, BFLOAT16, LEAD, Arg, Kernel, Op
from ._rows import kernel_residual, norm_and_residual, norm_tensors, product_dtypes

OP = Op(
    __name__,
    Arg("delta", "P, N T, K", LEAD, filled="K"),
    Arg("weight", "H, 2 D + E, K", BASE),
    Arg("q", "N, H, T, D", BASE, filled="H and D"),
    Arg("k", "N, H, T, D", BASE),
    Arg("v", "N, H, T, E", BASE, filled="E"),
    Arg("p", "N, H, T, T", BASE),
    Arg("project", "M, H E", BASE, filled="M"),
    *norm_and_residual("N T"),
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
    """Change of a transformer's self-attention (linear, attention, linear) when its input is perturbed.

    out[p] = residual[p] + attended[p] project^T, with the heads of attended concatenated
    attended = attention_difference(dq, dk, dv, q, k, v, p, scale) where [dq, dk, dv] = d weight[h]^T for head h
    d = delta[p], or with a norm layer_norm_difference(delta, *norm)[p]

    delta     [P, N T, K]     N samples of T tokens
    weight    [H, 2 D + E, K] of the linear layers before the attention: for every head D rows that give queries, D that
                              give keys, E that give values; float64 for a float64 delta, else float32
    q, k      [N, H, T, D]    base queries and keys, of the dtype of weight
    v         [N, H, T, E]    base values, of the dtype of weight
    p         [N, H, T, T]    base attention, rounded once, of the dtype of weight; where it is 0 (masked) it stays
                              exactly 0
    project   [M, H E]        weight of the linear layer after the attention, of the dtype of weight
    residual  [P, N T, M]     difference to add, any floating-point dtype; None means 0
    norm      zc [N T, K], var [N T] float64, gamma [K] or None, eps; None means no norm
    result    [P, N T, M]     contiguous

    The linear layers' operands and the result have the dtype of delta unless operands or out_dtype is given.

    Exactness: as linear_difference, attention_difference and linear_difference in sequence, in float32. With
    operands=torch.bfloat16 d, the weights and the change of the attention are rounded to bfloat16 once; sums and the
    attention itself stay in float32.
    Cost: 2 N T H (K (2 D + E) + 2 T (D + E) + E M) operations per perturbation. All intermediate values stay in cache;
    meant for weights that fit there too.
    """
    OP(delta, weight, q, k, v, p, project, *norm_tensors(OP.name, norm), residual)
    options = {"scale": float(scale), **product_dtypes(OP.name, delta, operands, out_dtype)}
    residual = kernel_residual(residual, delta)
    return backends.run(OP.name, delta, delta, weight, q, k, v, p, project, residual, norm, **options)
