from __future__ import annotations

import torch
from torch import Tensor

from .._load import native


def gelu_difference(delta: Tensor, z: Tensor, *, approximate: str, out_dtype: torch.dtype) -> Tensor:
    delta, z = delta.contiguous(), z.contiguous()
    inner = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    out = torch.empty(delta.shape, dtype=inner, device="cpu")
    native().gelu_difference(
        delta.data_ptr(), z.data_ptr(), out.data_ptr(), delta.shape[0], z.numel(), approximate == "tanh",
        delta.dtype == torch.bfloat16, inner == torch.bfloat16,
    )  # fmt: skip
    return out.to(out_dtype)
