from __future__ import annotations

from torch import Tensor

from . import cross_entropy_difference


def run(delta: Tensor, channel: Tensor, weight: Tensor, log_probs: Tensor, target: Tensor) -> Tensor:
    rows = weight.double().t()[channel]  # [P, K]
    return cross_entropy_difference.run(log_probs, target, delta.double().unsqueeze(2) * rows.unsqueeze(1))
