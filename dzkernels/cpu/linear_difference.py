from __future__ import annotations

import torch
from torch import Tensor

from .._norm import RowNorm
from . import is_half, kernel_dtype, launch, row_norm


def run(
    delta: Tensor, weight: Tensor, residual: Tensor | None, norm: RowNorm | None, *,
    operands: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    delta, weight = delta.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    *base, eps = row_norm(norm)
    out = torch.empty(*delta.shape[:2], len(weight), dtype=kernel_dtype(out_dtype), device="cpu")
    launch(
        __name__, delta, *base, weight, residual, out, eps, *delta.shape, len(weight),
        is_half(delta), is_half(residual), is_half(out), operands == torch.bfloat16,
    )  # fmt: skip
    return out.to(out_dtype)
