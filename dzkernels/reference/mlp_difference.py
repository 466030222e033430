from __future__ import annotations

import torch
from torch import Tensor

from .gelu_difference import gelu_difference


def mlp_difference(
    delta: Tensor, up: Tensor, z: Tensor, down: Tensor, residual: Tensor | None, *,
    approximate: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    moved = delta.double() @ up.double().T
    out = gelu_difference(moved, z.double(), approximate=approximate, out_dtype=torch.float64) @ down.double().T
    return (out if residual is None else residual.double() + out).to(out_dtype)
