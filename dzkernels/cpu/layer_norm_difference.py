from __future__ import annotations

import torch
from torch import Tensor

from . import is_half, kernel_dtype, launch


def run(
    delta: Tensor, zc: Tensor, var: Tensor, gamma: Tensor | None, *, eps: float, centre: bool, out_dtype: torch.dtype
) -> Tensor:
    delta, zc, var = delta.contiguous(), zc.contiguous(), var.contiguous()
    weight = None if gamma is None else gamma.float().contiguous()
    out = torch.empty(delta.shape, dtype=kernel_dtype(out_dtype), device="cpu")
    launch(
        __name__, delta, zc, var, weight, out, eps, *delta.shape, centre, is_half(delta),
        is_half(out),
    )  # fmt: skip
    return out.to(out_dtype)
