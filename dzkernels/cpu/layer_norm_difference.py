from __future__ import annotations

import torch
from torch import Tensor

from .._load import native


def layer_norm_difference(
    delta: Tensor, zc: Tensor, var: Tensor, gamma: Tensor | None, *, eps: float, centre: bool, out_dtype: torch.dtype
) -> Tensor:
    delta, zc, var = delta.contiguous(), zc.contiguous(), var.contiguous()
    weight = None if gamma is None else gamma.float().contiguous()
    inner = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    out = torch.empty(delta.shape, dtype=inner, device="cpu")
    native().layer_norm_difference(
        delta.data_ptr(), zc.data_ptr(), var.data_ptr(), 0 if weight is None else weight.data_ptr(), out.data_ptr(),
        eps, *delta.shape, centre, delta.dtype == torch.bfloat16, inner == torch.bfloat16,
    )  # fmt: skip
    return out.to(out_dtype)
