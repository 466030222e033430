"""Random gradient estimation: differences along random directions that move every selected weight at once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..carriers import Dense
from ..engine import Prepared
from ..execute.pieces import in_pieces
from ..objective import Objective, check_finite
from ..plan import peak_bytes
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
        block = self._block(ready, list(selected))
        if ready.whole is not None:
            for name, where in selected.items():
                ready.whole.check_step(name, where, self.mu)
        drawn = self.directions.draw(len(total), self.estimates)
        while rows := list(itertools.islice(drawn, block)):
            u = torch.stack(rows).to(device)

            def slopes(start: int, stop: int, u: Tensor = u) -> Tensor:
                return self._quotients(functools.partial(self._differences, ready, selected, u[start:stop]))

            slope, block = in_pieces(len(u), block, slopes, "blocks of random directions")
            if not bool(slope.isfinite().all()):
                check_finite(float("nan"), f"along a random direction with mu={self.mu:g}")
            total += slope @ u.double()
        total /= self.directions.count
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
        return max(1, min(self.directions.count, self.engine.budget() // need))

    def _differences(self, ready: Prepared, selected: dict[str, Tensor], u: Tensor, step: float) -> Tensor:
        """Loss differences [P] in float64 at w + step u."""
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
