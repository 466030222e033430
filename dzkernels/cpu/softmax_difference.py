from __future__ import annotations

import torch
from torch import Tensor

from . import launch


def softmax_difference(delta: Tensor, p: Tensor, *, log: bool) -> Tensor:
    delta, p = delta.contiguous(), p.contiguous()
    out = torch.empty(delta.shape, dtype=torch.float32, device="cpu")
    launch("softmax_difference", delta, p, out, *delta.shape, log)
    return out
