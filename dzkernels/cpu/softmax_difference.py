from __future__ import annotations

import torch
from torch import Tensor

from .._load import native


def softmax_difference(delta: Tensor, p: Tensor, *, log: bool) -> Tensor:
    delta, p = delta.contiguous(), p.contiguous()
    out = torch.empty(delta.shape, dtype=torch.float32, device="cpu")
    native().softmax_difference(delta.data_ptr(), p.data_ptr(), out.data_ptr(), *delta.shape, log)
    return out
