"""What the estimators on the difference engine share: options, moves, and the transaction around an estimate."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Engine, Prepared
from ..errors import ObjectiveError, StepError
from ..evaluator import Evaluator, quotient
from ..execute.pieces import in_pieces
from ..objective import Mask, Objective, check_finite
from ..state import parameter_of, set_random_state, uninterrupted, write_buffers
from ..surroundings import give
from .directions import Directions
from .interface import Estimate, Estimator, StepResult, accumulate
from .options import SCHEMES, check_mu, check_scheme, spelled_out


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

    A subclass says how many moves an estimate makes (:meth:`moves`) and what gradient they give (:meth:`gradients`),
    as a rule by :meth:`along_coordinates` and :meth:`along_directions`; ``docs/new-estimator.md`` writes one.
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            signature = spelled_out(vars(cls)["__init__"], cls.__mro__[1])
            cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]

    @property
    def signs(self) -> tuple[float, ...]:
        return SCHEMES[self.scheme]

    # --- what a subclass says

    @abstractmethod
    def moves(self, selected: dict[str, Tensor]) -> int:
        """How many coordinates and directions an estimate moves along, each taking one query for each sign.

        selected  parameter name -> coordinates [n, rank] int64 of the mask
        """

    @abstractmethod
    def gradients(self, evaluator: Evaluator, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameter name -> estimate in the parameter's shape and dtype. Changes nothing of the estimator."""

    def remember(self, grads: dict[str, Tensor]) -> None:
        """Keep what later estimates need of this step; part of ``backward``'s commit, before anything is written."""

    # --- what a subclass is made of

    def along_coordinates(self, evaluator: Evaluator, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        """One quotient for each selected coordinate, 0 elsewhere."""
        self._check_steps(evaluator, selected)
        grads = self._empty_grads(selected)
        for name, where in selected.items():
            for part, quotients in evaluator.coordinates(name, where, self.mu, self.signs):
                grads[name][tuple(part.unbind(1))] = quotients.to(grads[name].dtype)
        return grads

    def along_directions(
        self, evaluator: Evaluator, selected: dict[str, Tensor], directions: Directions, number: int
    ) -> dict[str, Tensor]:
        """The mean of quotient times direction over the directions of draw ``number``, which move what is selected."""
        self._check_steps(evaluator, selected)
        device = parameter_of(self.model, next(iter(selected))).device
        sizes = [len(where) for where in selected.values()]
        total = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        block = evaluator.directions_at_once(list(selected), directions.count)
        drawn = directions.draw(len(total), number)
        while rows := list(itertools.islice(drawn, block)):
            u = torch.stack(rows).to(device)

            def slopes(start: int, stop: int, u: Tensor = u) -> Tensor:
                moves = (self._steps(selected, u[start:stop], sign * self.mu) for sign in self.signs)
                return quotient([evaluator.along(moved) for moved in moves], self.mu)

            slope, block = in_pieces(len(u), block, slopes, "blocks of random directions")
            if not bool(slope.isfinite().all()):
                check_finite(float("nan"), f"along a random direction with mu={self.mu:g}")
            total += slope @ u.double()
        total /= directions.count
        grads = self._empty_grads(selected)
        for (name, where), part in zip(selected.items(), total.split(sizes), strict=True):
            grads[name][tuple(where.unbind(1))] = part.to(grads[name].dtype)
        return grads

    def _steps(self, selected: dict[str, Tensor], u: Tensor, step: float) -> dict[str, Tensor]:
        """Parameter name -> step u [P, *shape] in the dtype of queries, for directions u [P, d] of the selection."""
        parts = u.split([len(where) for where in selected.values()], dim=1)
        moved = {}
        for (name, where), part in zip(selected.items(), parts, strict=True):
            shape = parameter_of(self.model, name).shape
            steps = (step * part).to(self.engine.dtype)
            if len(where) == shape.numel():  # every coordinate, in order
                moved[name] = steps.reshape(len(u), *shape)
                continue
            moved[name] = torch.zeros((len(u), *shape), dtype=self.engine.dtype, device=u.device)
            at: Any = (slice(None), *where.unbind(1))
            moved[name][at] = steps
        return moved

    def _check_steps(self, evaluator: Evaluator, selected: dict[str, Tensor]) -> None:
        for name, where in selected.items():
            for sign in self.signs:
                evaluator.check_step(name, where, sign * self.mu)

    def _empty_grads(self, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(parameter_of(self.model, name), requires_grad=False) for name in selected}

    # --- the transaction

    def _work(self, batch: Any, mask: Mask | None) -> tuple[Prepared, dict[str, Tensor], int]:
        self.engine.initialise(batch)
        selected = self.engine.selected(mask)
        queries = 1 + len(self.signs) * self.moves(selected)
        self._spend(queries)
        with self.engine.prepared(batch) as ready:
            if not ready.evaluator.reaches(list(selected)):
                raise ObjectiveError(
                    "the loss does not depend on any parameter that the mask selects, so its gradient is zero. The "
                    "objective has to use the model that it is given, as objective(model, batch), and not another one "
                    "or a copy of its weights."
                )
            grads = self.gradients(ready.evaluator, selected)
        if not any(bool(grad.any()) for grad in grads.values()):
            self.engine.warn_once(
                f"none of {queries - 1:,} queries saw the loss change, so the gradient is zero: at mu = {self.mu:g} "
                "the loss looks constant. Where it is piecewise constant (rounding, thresholds, counts), a larger mu "
                "sees its steps: deepzero.report.check.check tries several and suggests one."
            )
        return ready, grads, queries

    def estimate(self, batch: Any, mask: Mask | None = None) -> Estimate:
        ready, grads, queries = self._work(batch, mask)
        self._done(queries)
        return Estimate(ready.loss, grads, queries)

    def backward(self, batch: Any, mask: Mask | None = None) -> StepResult:
        ready, grads, queries = self._work(batch, mask)
        with uninterrupted():
            self.remember(grads)
            write_buffers(self.model, ready.buffers)
            set_random_state(ready.random)
            give(ready.left)
            accumulate(self.model, grads)
            self._done(queries)
        return StepResult(ready.loss, queries)
