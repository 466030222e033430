from __future__ import annotations

import torch
from torch import Tensor

from .._load import native
from .._norm import RowNorm


def mlp_difference(
    delta: Tensor, up: Tensor, z: Tensor, down: Tensor, residual: Tensor | None, norm: RowNorm | None, *,
    approximate: str, operands: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    delta, up, z, down = (t.contiguous() for t in (delta, up, z, down))
    residual = None if residual is None else residual.contiguous()
    zc, var, gamma = (None, None, None) if norm is None else (norm.zc, norm.var, norm.gamma)
    base = [None if t is None else t.contiguous() for t in (zc, var, None if gamma is None else gamma.float())]
    inner = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    out = torch.empty(*delta.shape[:2], len(down), dtype=inner, device="cpu")
    native().mlp_difference(
        delta.data_ptr(), *(0 if t is None else t.data_ptr() for t in base), up.data_ptr(), z.data_ptr(),
        down.data_ptr(),
        0 if residual is None else residual.data_ptr(), out.data_ptr(), 0.0 if norm is None else norm.eps,
        *delta.shape, *down.T.shape,
        approximate == "tanh", delta.dtype == torch.bfloat16,
        residual is not None and residual.dtype == torch.bfloat16, inner == torch.bfloat16,
        operands == torch.bfloat16,
    )  # fmt: skip
    return out.to(out_dtype)
