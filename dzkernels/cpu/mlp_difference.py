from __future__ import annotations

import torch
from torch import Tensor

from .._norm import RowNorm
from . import is_half, kernel_dtype, launch, row_norm


def run(
    delta: Tensor, up: Tensor, z: Tensor, down: Tensor, residual: Tensor | None, norm: RowNorm | None, *,
    approximate: str, operands: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    delta, up, z, down = (t.contiguous() for t in (delta, up, z, down))
    residual = None if residual is None else residual.contiguous()
    *base, eps = row_norm(norm)
    out = torch.empty(*delta.shape[:2], len(down), dtype=kernel_dtype(out_dtype), device="cpu")
    launch(
        __name__, delta, *base, up, z, down, residual, out, eps, *delta.shape, *down.T.shape,
        approximate == "tanh", is_half(delta), is_half(residual), is_half(out), operands == torch.bfloat16,
    )  # fmt: skip
    return out.to(out_dtype)
