"""What the estimators on the difference engine share: the step, its scheme, and the transaction around an estimate."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Engine, Prepared
from ..errors import StepError
from ..objective import Mask, Objective
from ..state import set_random_state, uninterrupted, write_buffers
from .interface import Estimate, Estimator, StepResult, accumulate
from .options import SCHEMES, check_mu, check_scheme


class EngineEstimator(Estimator):
    """An estimator whose losses are differences propagated through the captured graph.

    model, objective  ``objective(model, batch)`` returns the loss as a tensor with one element
    mu                step, in weight units
    scheme            "forward", (L(w + mu v) - L(w)) / mu, or "central", (L(w + mu v) - L(w - mu v)) / 2 mu, for a
                      coordinate or direction v
    precision         "float32", "bfloat16" (half-width operands of convolutions and matrix products, float32
                      accumulation) or "float64"
    block             perturbations handled together; None sizes blocks by memory
    strict            raise :class:`NoRuleError` instead of evaluating an op without a rule the slow way
    budget            most queries in all; :class:`BudgetError` before the estimate that would exceed it

    Raises :class:`MaskError`, :class:`StepError`, :class:`ObjectiveError`, :class:`BudgetError` before any query.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        mu: float = 5e-3,
        scheme: str = "forward",
        precision: str = "float32",
        block: int | None = None,
        strict: bool = False,
        budget: int | None = None,
    ) -> None:
        self.mu = check_mu(mu)
        self.scheme = check_scheme(scheme)
        self.engine = Engine(model, objective, precision=precision, strict=strict, block=block)
        realised = float(torch.tensor(self.mu, dtype=torch.float64).to(self.engine.dtype))
        if not 0 < realised < float("inf"):
            raise StepError(
                f"mu = {mu!r} is {realised} in {precision}, which is no step. Use one between 1e-30 and 1e30."
            )
        if budget is not None and (not isinstance(budget, int) or budget < 0):
            raise ValueError(f"budget must be a number of queries or None, got {budget!r}")
        self.model = model
        self.objective = objective
        self.budget = budget
        self.queries = 0

    @property
    def signs(self) -> tuple[float, ...]:
        return SCHEMES[self.scheme]

    @abstractmethod
    def _count(self, selected: dict[str, Tensor]) -> int:
        """Queries of an estimate of these coordinates (parameter name -> [n, rank] int64), the base loss included."""

    @abstractmethod
    def _gradients(self, ready: Prepared, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameter name -> estimate in the parameter's shape and dtype. Changes nothing of the estimator."""

    def _remember(self, grads: dict[str, Tensor]) -> None:
        """Keep what later estimates need of this step; part of ``backward``'s commit, before anything is written."""

    def _work(self, batch: Any, mask: Mask | None) -> tuple[Prepared, dict[str, Tensor], int]:
        selected = self.engine.selected(mask)
        queries = self._count(selected)
        self._spend(queries)
        with self.engine.prepared(batch) as ready:
            return ready, self._gradients(ready, selected), queries

    def _done(self, queries: int) -> None:
        """Count what an estimate that came through has spent."""
        self.queries += queries

    def estimate(self, batch: Any, mask: Mask | None = None) -> Estimate:
        ready, grads, queries = self._work(batch, mask)
        self._done(queries)
        return Estimate(ready.loss, grads, queries)

    def backward(self, batch: Any, mask: Mask | None = None) -> StepResult:
        ready, grads, queries = self._work(batch, mask)
        with uninterrupted():
            self._remember(grads)
            write_buffers(self.model, ready.buffers)
            set_random_state(ready.random)
            accumulate(self.model, grads)
            self._done(queries)
        return StepResult(ready.loss, queries)

    def _check_steps(self, ready: Prepared, selected: dict[str, Tensor]) -> None:
        for name, where in selected.items():
            for sign in self.signs:
                ready.evaluator.check_step(name, where, sign * self.mu)

    def _empty_grads(self, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(self.model.get_parameter(name), requires_grad=False) for name in selected}
