from __future__ import annotations

import torch
from torch import Tensor

from .._norm import RowNorm
from . import attention_difference, linear_difference


def run(
    delta: Tensor, weight: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, project: Tensor,
    residual: Tensor | None, norm: RowNorm | None, *, scale: float, operands: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    samples, heads, tokens, inner = q.shape
    count, rows, width = *delta.shape[:2], weight.shape[1]
    wide = {"operands": torch.float64, "out_dtype": torch.float64}
    moved = linear_difference.run(delta, weight.flatten(0, 1), None, norm, **wide)
    moved = moved.reshape(count, samples, tokens, heads, width).transpose(2, 3)
    dq, dk, dv = moved.split([inner, inner, width - 2 * inner], -1)
    attended = attention_difference.run(dq, dk, dv, q, k, v, p, scale=scale, out_dtype=torch.float64)
    out = linear_difference.run(
        attended.transpose(2, 3).reshape(count, rows, project.shape[1]), project, None, None, **wide
    )
    return (out if residual is None else residual.double() + out).to(out_dtype)
