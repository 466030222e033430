from __future__ import annotations

import torch
from torch import Tensor

from .._norm import RowNorm
from . import is_half, kernel_dtype, launch, row_norm


def run(
    delta: Tensor, weight: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, project: Tensor,
    residual: Tensor | None, norm: RowNorm | None, *, scale: float, operands: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    delta, *base = (t.contiguous() for t in (delta, weight, q, k, v, p, project))
    residual = None if residual is None else residual.contiguous()
    *known, eps = row_norm(norm)
    out = torch.empty(*delta.shape[:2], len(project), dtype=kernel_dtype(out_dtype), device="cpu")
    launch(
        __name__, delta, *known, *base, residual, out, eps, scale, len(delta), *q.shape, v.shape[3],
        delta.shape[2], len(project), is_half(delta), is_half(residual), is_half(out), operands == torch.bfloat16,
    )  # fmt: skip
    return out.to(out_dtype)
