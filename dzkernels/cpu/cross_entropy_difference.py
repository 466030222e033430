from __future__ import annotations

import torch
from torch import Tensor

from .._load import native


def cross_entropy_difference(log_probs: Tensor, target: Tensor, dlogits: Tensor) -> Tensor:
    log_probs, target, dlogits = log_probs.contiguous(), target.contiguous(), dlogits.contiguous()
    probs = log_probs.exp()
    out = torch.empty(dlogits.shape[0], dtype=torch.float64, device="cpu")
    native().cross_entropy_difference(
        log_probs.data_ptr(), probs.data_ptr(), target.data_ptr(), dlogits.data_ptr(), out.data_ptr(), *dlogits.shape
    )
    return out
