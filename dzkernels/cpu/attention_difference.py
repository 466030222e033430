from __future__ import annotations

import torch
from torch import Tensor

from . import is_half, kernel_dtype, launch


def run(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, q: Tensor, k: Tensor, v: Tensor, p: Tensor, *,
    scale: float, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    given = next(d for d in (dq, dk, dv) if d is not None)
    operands = [_rows(values) if values is not None else None for values in (dq, dk, dv, q, k, v)]
    strides = torch.tensor([_strides(o, q.dim()) for o in operands], dtype=torch.int64)
    p = p.contiguous()
    samples, heads = p.shape[:-2] if q.dim() == 4 else (p.shape[0], 1)
    rows, width = q.shape[-2], v.shape[-1]
    out = torch.empty(given.shape[0], samples, rows, heads, width, dtype=kernel_dtype(out_dtype), device="cpu")
    launch(
        __name__, *operands, p, out, strides, scale, given.shape[0], samples, heads, rows, k.shape[-2],
        q.shape[-1], width, is_half(given), is_half(out),
    )  # fmt: skip
    out = out.to(out_dtype)
    return out.transpose(2, 3) if q.dim() == 4 else out.squeeze(3)


def _rows(values: Tensor) -> Tensor:
    """`values` with a contiguous last dimension, copied only if necessary."""
    return values if values.stride(-1) == 1 or values.shape[-1] == 1 else values.contiguous()


def _strides(values: Tensor | None, dims: int) -> tuple[int, int, int, int]:
    """Strides of perturbations, samples, heads and rows; 0 for dimensions that are absent."""
    if values is None:
        return 0, 0, 0, 0
    *outer, row, _ = values.stride()
    first = outer.pop(0) if values.dim() > dims else 0
    return first, outer[0], outer[1] if dims == 4 else 0, row
