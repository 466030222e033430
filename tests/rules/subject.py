"""A row of the table, built: quotients of sampled coordinates, in plain float64 and by the engine."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import deepzero as dz
from judge import WideCGE, double_batch, double_copy, quotients, restored
from rules.cases import Case

Quotients = dict[str, Tensor]
"""Parameter name -> quotients of its sampled coordinates, in order, in float64."""

PER_TENSOR = 6


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode())


class Subject:
    """One row of the table, built: model, batch, sampled coordinates, and estimators that share one capture."""

    def __init__(self, case: Case, *, per_tensor: int = PER_TENSOR) -> None:
        self.case = case
        torch.manual_seed(seed_of(case.id))
        self.model = case.model().train(case.train)
        self.batch = case.batch()
        self.where = sample(self.model, per_tensor, seed_of(case.id))
        self.mask = {}
        for name, at in self.where.items():
            self.mask[name] = torch.zeros(self.model.get_parameter(name).shape, dtype=torch.bool)
            self.mask[name][tuple(at.unbind(1))] = True
        self._estimators: dict[str, dz.CGE] = {}

    def estimator(self, precision: str) -> dz.CGE:
        if precision not in self._estimators:
            made = WideCGE(self.model, self.case.objective, precision=precision, strict=not self.case.falls_back)
            for other in self._estimators.values():
                made.engine.cache = other.engine.cache  # tracing takes most of a row's time
            self._estimators[precision] = made
        return self._estimators[precision]

    def ours(self, mu: float, precision: str) -> Quotients:
        torch.manual_seed(1)
        estimator = self.estimator(precision)
        estimator.mu = mu
        return self._sampled(estimator.estimate(self.batch, self.mask).grads)

    def plain(self, mu: float) -> tuple[Quotients, float]:
        """Quotients of whole losses in float64, and the base loss. Casts inside a model stay as they are."""
        twin, data = double_copy(self.model), double_batch(self.batch)

        def loss() -> float:
            torch.manual_seed(1)
            with restored(twin):
                return float(self.case.objective(twin, data))

        found, base = quotients(dict(twin.named_parameters()), loss, self.mask, mu)
        return self._sampled(found), base

    def _sampled(self, values: Mapping[str, Tensor]) -> Quotients:
        return {name: values[name][tuple(at.unbind(1))].reshape(-1) for name, at in self.where.items()}


def sample(model: nn.Module, per_tensor: int, seed: int) -> dict[str, Tensor]:
    """Up to ``per_tensor`` coordinates of every trainable parameter, sorted: name -> [n, rank]."""
    generator = torch.Generator().manual_seed(seed)
    where = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            flat = torch.randperm(p.numel(), generator=generator)[:per_tensor].sort().values
            where[name] = torch.stack(torch.unravel_index(flat, p.shape), 1) if p.dim() else flat[:, None][:, :0]
    return where
