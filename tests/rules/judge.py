"""Quotients of sampled coordinates, in plain float64 and by the engine, and the one rule by which they are compared."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import deepzero as dz
from rules.cases import Case

Quotients = dict[str, Tensor]
"""Parameter name -> quotients of its sampled coordinates, in order, in float64."""

PER_TENSOR = 6


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode())


class Unrounded(dz.CGE):
    """CGE whose estimate is not rounded to the parameters' dtype at the end."""

    def _empty_grads(self, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: grad.double() for name, grad in super()._empty_grads(selected).items()}


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
            made = Unrounded(self.model, self.case.objective, precision=precision, strict=not self.case.falls_back)
            for other in self._estimators.values():
                made.engine._cache = other.engine._cache  # tracing takes most of a row's time
            self._estimators[precision] = made
        return self._estimators[precision]

    def ours(self, mu: float, precision: str) -> Quotients:
        torch.manual_seed(1)
        estimator = self.estimator(precision)
        estimator.mu = mu
        grads = estimator.estimate(self.batch, self.mask).grads
        return {name: grads[name][tuple(at.unbind(1))].reshape(-1) for name, at in self.where.items()}

    def plain(self, mu: float) -> tuple[Quotients, float]:
        """Quotients of whole losses in float64, and the base loss."""
        return plain_quotients(self.model, self.case.objective, self.batch, self.where, mu)


def sample(model: nn.Module, per_tensor: int, seed: int) -> dict[str, Tensor]:
    """Up to ``per_tensor`` coordinates of every trainable parameter, sorted: name -> [n, rank]."""
    generator = torch.Generator().manual_seed(seed)
    where = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            flat = torch.randperm(p.numel(), generator=generator)[:per_tensor].sort().values
            where[name] = torch.stack(torch.unravel_index(flat, p.shape), 1) if p.dim() else flat[:, None][:, :0]
    return where


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def plain_quotients(
    model: nn.Module, objective: Any, batch: Any, where: Mapping[str, Tensor], mu: float
) -> tuple[Quotients, float]:
    """(L(w + mu e_i) - L(w)) / mu with everything in float64, one whole forward a coordinate."""
    wide = copy.deepcopy(model).double()
    buffers = {name: b.clone() for name, b in wide.named_buffers()}
    data = pytree.tree_map(_double, batch)

    def loss() -> float:
        torch.manual_seed(1)
        with torch.no_grad():
            for name, b in wide.named_buffers():
                b.copy_(buffers[name])
            return float(objective(wide, data))

    before = loss()
    found = {}
    with torch.no_grad():
        for name, at in where.items():
            p, rows = wide.get_parameter(name), []
            for index in at.tolist():
                kept = p[tuple(index)].clone()
                p[tuple(index)] += mu
                rows.append((loss() - before) / mu)
                p[tuple(index)] = kept
            found[name] = torch.tensor(rows, dtype=torch.float64)
    return found, before


def violations(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tol: float, floor: float = 0.0) -> list[str]:
    """Where ``got`` is off: |err_t| <= tol |q_t| + tol 1e-2 |q_model| / sqrt(#tensors) for every tensor t.

    ``floor`` is the reference's own noise in one quotient. The cosine of the whole vector is held to the same
    tolerance. NaN is a violation.
    """
    everything = torch.cat([want[name] for name in want])
    model = float(everything.norm())
    found = []
    for name, q in want.items():
        error = float((got[name] - q).norm())
        bound = tol * float(q.norm()) + tol * 1e-2 * model / math.sqrt(len(want)) + floor * math.sqrt(len(q))
        if not (error <= bound and math.isfinite(bound)):
            found.append(f"{name}: error {error:.3g}, allowed {bound:.3g}, |q_t| {float(q.norm()):.3g}")
    mine = torch.cat([got[name] for name in want])
    cosine = float(mine @ everything) / max(float(mine.norm()) * model, 1e-300)
    if model > 0 and not (cosine >= 1 - tol - floor / model):
        found.append(f"cosine {cosine:.9f}")
    return found


def worst(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The largest error in units of the rule's bound at tol = 1."""
    model = float(torch.cat([want[name] for name in want]).norm())
    ratios = []
    for name, q in want.items():
        scale = float(q.norm()) + 1e-2 * model / math.sqrt(len(want))
        error = float((got[name] - q).norm())
        ratios.append(0.0 if error == 0 else error / scale if scale else math.inf)
    return max(ratios)
