"""The network that the tests of single estimators share: batch statistics, dropout, biases, two layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def network() -> nn.Module:
    """No bias before the batch norm, where its gradient would be zero."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))


def objective(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)


def random_mask(model: nn.Module, share: float, seed: int) -> dict[str, Tensor]:
    """Each coordinate with probability ``share``."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) < share for name, p in model.named_parameters()}
