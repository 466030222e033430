from __future__ import annotations

import torch
from torch import Tensor

from .._norm import RowNorm
from . import attention_difference, linear_difference
from ._linear import operand_dtype


def run(
    delta: Tensor, weight: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, project: Tensor,
    residual: Tensor | None, norm: RowNorm | None, *, scale: float, operands: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    # Three kernels: the samples of all perturbations together fill a GPU, and intermediate values stay in its L2.
    samples, heads, tokens, inner = q.shape
    count, rows, width = *delta.shape[:2], weight.shape[1]
    moved = linear_difference.run(delta, weight.flatten(0, 1), None, norm, operands=operands, out_dtype=torch.float32)
    moved = moved.reshape(count, samples, tokens, heads, width).transpose(2, 3)
    dq, dk, dv = moved.split([inner, inner, width - 2 * inner], -1)
    attended = attention_difference.run(dq, dk, dv, q, k, v, p, scale=scale, out_dtype=operand_dtype(operands))
    beside = attended.transpose(2, 3).reshape(count, rows, project.shape[1])
    return linear_difference.run(beside, project, residual, None, operands=operands, out_dtype=out_dtype)
