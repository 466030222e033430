from __future__ import annotations

import torch
from torch import Tensor

from .._load import native
from .._norm import RowNorm


def linear_difference(
    delta: Tensor, weight: Tensor, residual: Tensor | None, norm: RowNorm | None, *,
    operands: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    delta, weight = delta.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    zc, var, gamma = (None, None, None) if norm is None else (norm.zc, norm.var, norm.gamma)
    base = [None if t is None else t.contiguous() for t in (zc, var, None if gamma is None else gamma.float())]
    inner = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    out = torch.empty(*delta.shape[:2], len(weight), dtype=inner, device="cpu")
    native().linear_difference(
        delta.data_ptr(), *(0 if t is None else t.data_ptr() for t in base), weight.data_ptr(),
        0 if residual is None else residual.data_ptr(), out.data_ptr(), 0.0 if norm is None else norm.eps,
        *delta.shape, len(weight), delta.dtype == torch.bfloat16,
        residual is not None and residual.dtype == torch.bfloat16, inner == torch.bfloat16,
        operands == torch.bfloat16,
    )  # fmt: skip
    return out.to(out_dtype)
