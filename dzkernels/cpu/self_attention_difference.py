from __future__ import annotations

import torch
from torch import Tensor

from .._load import native
from .._norm import RowNorm


def self_attention_difference(
    delta: Tensor, weight: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, project: Tensor,
    residual: Tensor | None, norm: RowNorm | None, *, scale: float, operands: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    delta, *base = (t.contiguous() for t in (delta, weight, q, k, v, p, project))
    residual = None if residual is None else residual.contiguous()
    zc, var, gamma = (None, None, None) if norm is None else (norm.zc, norm.var, norm.gamma)
    known = [None if t is None else t.contiguous() for t in (zc, var, None if gamma is None else gamma.float())]
    inner = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    out = torch.empty(*delta.shape[:2], len(project), dtype=inner, device="cpu")
    native().self_attention_difference(
        delta.data_ptr(), *(0 if t is None else t.data_ptr() for t in known), *(t.data_ptr() for t in base),
        0 if residual is None else residual.data_ptr(), out.data_ptr(), 0.0 if norm is None else norm.eps, scale,
        len(delta), *q.shape, v.shape[3], delta.shape[2], len(project),
        delta.dtype == torch.bfloat16, residual is not None and residual.dtype == torch.bfloat16,
        inner == torch.bfloat16, operands == torch.bfloat16,
    )  # fmt: skip
    return out.to(out_dtype)
