from __future__ import annotations

import torch
from torch import Tensor

from . import launch


def run(delta: Tensor, channel: Tensor, weight: Tensor, log_probs: Tensor, target: Tensor) -> Tensor:
    delta, channel, log_probs, target = (t.contiguous() for t in (delta, channel, log_probs, target))
    probs = log_probs.exp()
    out = torch.empty(delta.shape[0], dtype=torch.float64, device="cpu")
    launch(
        __name__, delta, channel, weight, log_probs, probs, target, out, *delta.shape,
        weight.shape[0], *weight.stride(),
    )  # fmt: skip
    return out
