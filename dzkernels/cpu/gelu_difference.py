from __future__ import annotations

import torch
from torch import Tensor

from .._load import native


def gelu_difference(delta: Tensor, z: Tensor, *, approximate: str) -> Tensor:
    delta, z = delta.contiguous(), z.contiguous()
    out = torch.empty(delta.shape, dtype=torch.float32, device="cpu")
    native().gelu_difference(
        delta.data_ptr(), z.data_ptr(), out.data_ptr(), delta.shape[0], z.numel(), approximate == "tanh"
    )
    return out
