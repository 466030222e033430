"""Random gradient estimation: differences along random directions that move every selected weight at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..carriers import Dense
from ..engine import Prepared
from ..plan import MEMORY, peak_bytes
from .base import Objective
from .checks import check_finite
from .engine_estimator import EngineEstimator

Draw = Callable[[int, torch.Generator], Tensor]


def _gaussian(d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(d, generator=generator)


def _sphere(d: int, generator: torch.Generator) -> Tensor:
    """Uniform on the sphere of radius sqrt(d), so that E[u u^T] = I as for the others (the slides' unit-sphere form
    with factor d/mu is the same estimator)."""
    u = torch.randn(d, generator=generator, dtype=torch.float64)
    return (u * (math.sqrt(d) / u.norm())).float()


def _rademacher(d: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (d,), generator=generator).float() * 2 - 1


DISTRIBUTIONS: dict[str, Draw] = {"gaussian": _gaussian, "sphere": _sphere, "rademacher": _rademacher}
"""distribution -> one direction u of dimension d with E[u u^T] = I."""


class RGE(EngineEstimator):
    """Random-direction finite differences (paper, eq. 1), unbiased for the smoothed loss.

    g = (1/q) sum_i (L(w + mu u_i) - L(w)) / mu * u_i                 (scheme="forward", q + 1 queries)
    g = (1/q) sum_i (L(w + mu u_i) - L(w - mu u_i)) / (2 mu) * u_i    (scheme="central", 2 q + 1: antithetic pairs)

    with E[u u^T] = I over the selected coordinates, so the norm of g is about sqrt((q + d) / q) times the gradient's.

    queries       q, directions an estimate (the total spent is the attribute of that name)
    distribution  "gaussian", "sphere" or "rademacher"
    seed          directions follow from (seed, number of the estimate) alone, never from the global random state

    Other arguments and errors as in :class:`EngineEstimator`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        queries: int = 192,
        distribution: str = "gaussian",
        mu: float = 5e-3,
        scheme: str = "forward",
        seed: int = 0,
        precision: str = "float32",
        block: int | None = None,
        strict: bool = False,
        budget: int | None = None,
    ) -> None:
        super().__init__(
            model, objective, mu=mu, scheme=scheme, precision=precision, block=block, strict=strict, budget=budget
        )
        if not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, got {seed!r}")
        if not isinstance(queries, int) or queries < 1:
            raise ValueError(f"queries must be a positive number of directions, got {queries!r}")
        if distribution not in DISTRIBUTIONS:
            known = ", ".join(map(repr, DISTRIBUTIONS))
            raise ValueError(f"distribution must be one of {known}, got {distribution!r}")
        self.directions = queries
        self.distribution = distribution
        self.seed = seed
        self.estimates = 0

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"estimates": self.estimates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.estimates = int(state["estimates"])

    def _done(self, queries: int) -> None:
        super()._done(queries)
        self.estimates += 1

    def _count(self, selected: dict[str, Tensor]) -> int:
        return 1 + len(self.signs) * self.directions

    def _gradients(self, ready: Prepared, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = {name: self.model.get_parameter(name) for name in selected}
        device = next(iter(parameters.values())).device
        sizes = [len(where) for where in selected.values()]
        generator = torch.Generator().manual_seed(_mix(self.seed, self.estimates))
        total = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        block = self._block(ready, list(selected))
        if ready.whole is not None:
            for name, where in selected.items():
                ready.whole.check_step(name, where, self.mu)
        for start in range(0, self.directions, block):
            count = min(block, self.directions - start)
            draws = [DISTRIBUTIONS[self.distribution](len(total), generator) for _ in range(count)]
            u = torch.stack(draws).to(device)
            slope = self._quotients(functools.partial(self._differences, ready, selected, u))
            if not bool(slope.isfinite().all()):
                check_finite(float("nan"), f"along a random direction with mu={self.mu:g}")
            total += slope @ u.double()
        total /= self.directions
        grads = self._empty_grads(selected)
        for (name, where), part in zip(selected.items(), total.split(sizes), strict=True):
            grads[name][tuple(where.unbind(1))] = part.to(grads[name].dtype)
        return grads

    def _block(self, ready: Prepared, names: list[str]) -> int:
        if ready.base is None:
            return 1
        if self.engine.block is not None:
            return self.engine.block
        graph = ready.base.graph
        starts = [node for name in names for node in graph.placeholders(name)]
        weights = 4 * sum(self.model.get_parameter(name).numel() for name in names)
        need = 3 * weights + peak_bytes(self.engine.joint_steps(graph, names), starts, dense=True)
        device = self.model.get_parameter(names[0]).device.type
        return max(1, min(self.directions, MEMORY.get(device, MEMORY["cpu"]) // need))

    def _differences(self, ready: Prepared, selected: dict[str, Tensor], u: Tensor, step: float) -> Tensor:
        """Loss differences [P] in float64 at w + step u."""
        parts = u.split([len(where) for where in selected.values()], dim=1)
        moved = {}
        for (name, where), part in zip(selected.items(), parts, strict=True):
            shape = self.model.get_parameter(name).shape
            values = torch.zeros((len(u), *shape), dtype=self.engine.dtype, device=u.device)
            at: Any = (slice(None), *where.unbind(1))
            values[at] = (step * part).to(self.engine.dtype)
            moved[name] = values
        if ready.whole is not None:
            whole = ready.whole
            losses = []
            for p in range(len(u)):
                at = {name: whole.parameter(name) + values[p] for name, values in moved.items()}
                kept = {
                    name: v if whole.double else v.to(self.model.get_parameter(name).dtype) for name, v in at.items()
                }
                losses.append(whole.evaluate(kept) - whole.loss)
            return torch.tensor(losses, dtype=torch.float64, device=u.device)
        assert ready.base is not None
        steps = self.engine.joint_steps(ready.base.graph, list(selected))
        seeds = {name: Dense(values) for name, values in moved.items()}
        return self.engine.run(ready.base, steps, seeds, len(u))


def _mix(seed: int, number: int) -> int:
    """One 63-bit seed from two numbers (splitmix64 finaliser), so that neighbouring estimates share nothing."""
    z = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1
