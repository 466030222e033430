"""Random gradient estimation: differences along random directions that move every selected weight at once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Prepared
from ..evaluator import quotient
from ..execute.pieces import in_pieces
from ..objective import Objective, check_finite
from .directions import Directions
from .engine_estimator import EngineEstimator


class RGE(EngineEstimator):
    """Random-direction finite differences (paper, eq. 1), unbiased for the smoothed loss.

    g = (1/q) sum_i (L(w + mu u_i) - L(w)) / mu * u_i                 (scheme="forward", q + 1 queries)
    g = (1/q) sum_i (L(w + mu u_i) - L(w - mu u_i)) / (2 mu) * u_i    (scheme="central", 2 q + 1: antithetic pairs)

    with E[u u^T] = I over the selected coordinates: directions live in the mask's subspace. The norm of g is about
    sqrt((q + d) / q) times the gradient's, for d coordinates; sqrt(d / q) with orthogonal directions, whose estimate is
    d/q times the projection on their span and at q = d the whole gradient.

    queries       q, directions an estimate (the total spent is the attribute of that name)
    distribution  "gaussian", "sphere" (radius sqrt(d)), "rademacher" (+-1) or "orthogonal" (on that sphere, at right
                  angles to each other; q <= d or ValueError)
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
        self.directions = Directions(queries, distribution, seed)
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
        self.directions.check(sum(map(len, selected.values())))
        return 1 + len(self.signs) * self.directions.count

    def _gradients(self, ready: Prepared, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        device = self.model.get_parameter(next(iter(selected))).device
        sizes = [len(where) for where in selected.values()]
        total = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        evaluator = ready.evaluator
        self._check_steps(ready, selected)
        block = evaluator.directions_at_once(list(selected), self.directions.count)
        drawn = self.directions.draw(len(total), self.estimates)
        while rows := list(itertools.islice(drawn, block)):
            u = torch.stack(rows).to(device)

            def slopes(start: int, stop: int, u: Tensor = u) -> Tensor:
                moves = (self._steps(selected, u[start:stop], sign * self.mu) for sign in self.signs)
                return quotient([evaluator.along(moved) for moved in moves], self.mu)

            slope, block = in_pieces(len(u), block, slopes, "blocks of random directions")
            if not bool(slope.isfinite().all()):
                check_finite(float("nan"), f"along a random direction with mu={self.mu:g}")
            total += slope @ u.double()
        total /= self.directions.count
        grads = self._empty_grads(selected)
        for (name, where), part in zip(selected.items(), total.split(sizes), strict=True):
            grads[name][tuple(where.unbind(1))] = part.to(grads[name].dtype)
        return grads

    def _steps(self, selected: dict[str, Tensor], u: Tensor, step: float) -> dict[str, Tensor]:
        """Parameter name -> step u [P, *shape] in the dtype of queries, for directions u [P, d] of the selection."""
        parts = u.split([len(where) for where in selected.values()], dim=1)
        moved = {}
        for (name, where), part in zip(selected.items(), parts, strict=True):
            shape = self.model.get_parameter(name).shape
            steps = (step * part).to(self.engine.dtype)
            if len(where) == shape.numel():  # every coordinate, in order
                moved[name] = steps.reshape(len(u), *shape)
                continue
            moved[name] = torch.zeros((len(u), *shape), dtype=self.engine.dtype, device=u.device)
            at: Any = (slice(None), *where.unbind(1))
            moved[name][at] = steps
        return moved
