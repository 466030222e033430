from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .. import backends
from .._op import BASE, BFLOAT16, LEAD, Arg, Kernel, Op


def _args(pairs: str) -> tuple[Arg, ...]:
    return (
        Arg("q", f"{pairs}, T, D", BASE),
        Arg("k", f"{pairs}, S, D", BASE, filled="S and D"),
        Arg("v", f"{pairs}, S, E", BASE, filled="E"),
        Arg("p", f"{pairs}, T, S", BASE),
        Arg("dq", f"P, {pairs}, T, D", LEAD, optional=True),
        Arg("dk", f"P, {pairs}, S, D", LEAD, optional=True),
        Arg("dv", f"P, {pairs}, S, E", LEAD, optional=True),
    )


KERNELS = {"cpu": Kernel(BFLOAT16), "triton": Kernel(BFLOAT16)}
OP = Op(__name__, *_args("B"), **KERNELS)
# The same op with samples and heads as two dimensions.
OP_OF_HEADS = Op(__name__, *_args("N, H"), **KERNELS)


def attention_difference(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    *,
    scale: float,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Change of the attention softmax(scale * q k^T + mask) v when q, k and v are perturbed.

    dS = scale * (dq k^T + (q + dq) dk^T)
    dA = p * expm1(dS - m), m = log(sum_s p exp(dS)) for each row, as in softmax_difference
    out = dA v + (p + dA) dv

    B counts pairs of sample and head. All tensors may instead have two dimensions N, H in its place.

    dq      [P, B, T, D]  differences of one dtype; None where q (k, v) is constant; at least one must be given
    dk      [P, B, S, D]
    dv      [P, B, S, E]
    q       [B, T, D]     base query, float64 for float64 differences, else float32
    k, v    [B, S, D], [B, S, E]  base key and value, of the dtype of q
    p       [B, T, S]     base attention, rounded once, of the dtype of q; where it is 0 (masked) it stays exactly 0
    result  [P, B, T, E]  contiguous; with N and H [P, N, H, T, E], a view of contiguous [P, N, T, H, E] memory

    The result has the dtype of the differences unless out_dtype is given. Inputs are read in place if their last
    dimension is contiguous.

    Exactness: products as in linear_difference, with errors of at most

        in    CPU (sums in order)           tensor cores                  of
        dS    (2 D + 4) u                   (2 D + 19) u                  the sum of |terms| of dS
        dA    24 u, as in softmax_difference, and the error of dS carried through
        out   (2 S + 2) u                   (2 S + 17) u                  the sum of |terms| of out

    Cost: per pair 2 T S D operations for each of dq and dk, 2 T S E for dv and again for dA, and T S exponentials.
    """
    given = next((d for d in (dq, dk, dv) if d is not None), None)
    if given is None:
        raise ValueError(f"dz::{OP.name}: dq, dk or dv must be given, got None for all")
    dims = check.of_dtype(OP.name, "q", q, check.FLOATS).dim()
    if dims not in (3, 4):
        raise ValueError(f"dz::{OP.name}: q must be of shape [B, T, D] or [N, H, T, D], got {check.shape(q)}")
    (OP if dims == 3 else OP_OF_HEADS)(q, k, v, p, dq, dk, dv)
    out_dtype = check.float_dtype(OP.name, "out_dtype", out_dtype, given.dtype)
    return backends.run(OP.name, given, dq, dk, dv, q, k, v, p, scale=float(scale), out_dtype=out_dtype)
