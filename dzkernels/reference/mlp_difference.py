from __future__ import annotations

import torch
from torch import Tensor

from .._norm import RowNorm
from . import gelu_difference, layer_norm_difference


def run(
    delta: Tensor, up: Tensor, z: Tensor, down: Tensor, residual: Tensor | None, norm: RowNorm | None, *,
    approximate: str, operands: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    wide = delta.double()
    if norm is not None:
        zc, gamma = norm.zc.double(), None if norm.gamma is None else norm.gamma.double()
        wide = layer_norm_difference.run(wide, zc, norm.var, gamma, eps=norm.eps, centre=True, out_dtype=torch.float64)
    moved = wide @ up.double().T
    out = gelu_difference.run(moved, z.double(), approximate=approximate, out_dtype=torch.float64) @ down.double().T
    return (out if residual is None else residual.double() + out).to(out_dtype)
