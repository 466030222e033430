"""Coordinate-wise gradient estimation (Chen et al., ICLR 2024, eq. 2): one finite difference per coordinate."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Base
from ..carriers import OneEntry, describe
from ..engine import Engine, Prepared
from ..errors import StepError
from ..fusion import Step
from ..plan import Line, Plan, missing_rules
from ..state import set_random_state, uninterrupted, write_buffers
from .base import Estimate, Estimator, Mask, Objective, StepResult, accumulate
from .checks import check_finite, check_mu, check_scheme

SCHEMES = {"forward": (1.0,), "central": (1.0, -1.0)}
"""scheme -> the signs of the steps; the difference of the outermost losses is divided by their distance."""


class EngineEstimator(Estimator):
    """What the estimators on the difference engine share: the transaction around an estimate."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        mu: float,
        scheme: str,
        schemes: Any,
        precision: str,
        block: int | None,
        strict: bool,
        budget: int | None,
    ) -> None:
        self.mu = check_mu(mu)
        self.scheme = check_scheme(scheme, schemes)
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

    def _count(self, selected: dict[str, Tensor]) -> int:
        raise NotImplementedError

    def _gradients(self, ready: Prepared, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

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
            write_buffers(self.model, ready.buffers)
            set_random_state(ready.random)
            accumulate(self.model, grads)
            self._done(queries)
        return StepResult(ready.loss, queries)

    def _empty_grads(self, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(self.model.get_parameter(name), requires_grad=False) for name in selected}


class CGE(EngineEstimator):
    """Coordinate-wise finite differences, propagated exactly through the captured graph.

    g_i = (L(w + mu e_i) - L(w)) / mu           (scheme="forward", one query a coordinate)
    g_i = (L(w + mu e_i) - L(w - mu e_i)) / 2mu (scheme="central", two)

    Weights are never written, so mu is used exactly whatever the weights' dtype. Quotients match float64 quotients
    with the same step to about float32 rounding at any mu; the default is the paper's.

    model, objective  ``objective(model, batch)`` returns the loss as a tensor with one element
    mu                step, in weight units
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
        super().__init__(
            model,
            objective,
            mu=mu,
            scheme=scheme,
            schemes=SCHEMES,
            precision=precision,
            block=block,
            strict=strict,
            budget=budget,
        )

    def _count(self, selected: dict[str, Tensor]) -> int:
        return 1 + len(SCHEMES[self.scheme]) * sum(map(len, selected.values()))

    def _quotients(self, differences: Tensor) -> Tensor:
        """[signs, P] loss differences -> [P] quotients."""
        if self.scheme == "forward":
            return differences[0] / self.mu
        return (differences[0] - differences[1]) / (2 * self.mu)

    def _blocks(self, base: Base, name: str, where: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(coordinates [P, rank], quotients [P]) block by block."""
        engine = self.engine
        route = engine.route(base.graph, name)
        signs = SCHEMES[self.scheme]
        for part in where.split(route.block):
            if not route.suffix and base.graph.loss not in base.graph.placeholders(name):
                yield part, torch.zeros(len(part), dtype=torch.float64, device=part.device)
                continue
            losses = []
            for sign in signs:
                step = torch.full((len(part),), sign * self.mu, dtype=engine.dtype, device=part.device)
                seed = OneEntry(route.shape, part, step)
                losses.append(engine.run(base, route.steps, {name: seed}, len(part)))
            # the step a difference starts from is mu rounded to the query dtype; divide by that very number
            realised = float(torch.tensor(self.mu, dtype=engine.dtype))
            quotients = self._quotients(torch.stack(losses)) * (self.mu / realised)
            if not bool(quotients.isfinite().all()):
                worst = int((~quotients.isfinite()).nonzero()[0, 0])
                check_finite(float(quotients[worst]), f"with {name}{part[worst].tolist()} moved by {self.mu:g}")
            yield part, quotients

    def _gradients(self, ready: Prepared, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        grads = self._empty_grads(selected)
        if ready.whole is not None:
            return self._whole(ready, selected, grads)
        assert ready.base is not None
        for name, where in selected.items():
            for part, quotients in self._blocks(ready.base, name, where):
                grads[name][tuple(part.unbind(1))] = quotients.to(grads[name].dtype)
        return grads

    def _whole(self, ready: Prepared, selected: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = ready.whole
        assert whole is not None
        signs = SCHEMES[self.scheme]
        for name, where in selected.items():
            for sign in signs:
                whole.check_step(name, where, sign * self.mu)
        for name, where in selected.items():
            for row in where:
                moved = [whole.move(name, row, sign * self.mu) for sign in signs]
                losses = [whole.evaluate({name: value}) for value, _ in moved]
                if self.scheme == "forward":
                    quotient = (losses[0] - whole.loss) / moved[0][1]
                else:
                    quotient = (losses[0] - losses[1]) / (moved[0][1] - moved[1][1])
                check_finite(quotient, f"with {name}{row.tolist()} moved by {self.mu:g}")
                grads[name][tuple(row.tolist())] = quotient
        return grads

    def plan(self, batch: Any, mask: Mask | None = None) -> Plan:
        """What :meth:`estimate` would do with this batch and mask, timed on one block per parameter. Pure."""
        selected = self.engine.selected(mask)
        lines: list[Line] = []
        with self.engine.prepared(batch) as ready:
            for name, where in selected.items() if ready.base is not None else ():
                lines.append(self._line(ready.base, name, where))  # type: ignore[arg-type]
            return Plan(lines, self._count(selected), self.engine.precision, ready.reason, ready.capture_seconds)

    def _line(self, base: Base, name: str, where: Tensor) -> Line:
        from torch.utils.flop_counter import FlopCounterMode

        route = self.engine.route(base.graph, name)
        part = where[: route.block]
        step = torch.full((len(part),), self.mu, dtype=self.engine.dtype, device=part.device)
        seed = {name: OneEntry(route.shape, part, step)}
        counter = FlopCounterMode(display=False)
        with counter:
            self.engine.run(base, route.steps, seed, len(part))
        kinds: list[str] = []
        kernels: Counter[str] = Counter()
        began = last = time.perf_counter()

        def observe(step: Step, carrier: Any, fused: bool) -> None:
            nonlocal last
            now = time.perf_counter()
            kind = describe(carrier)
            if kind != "Zero":
                kinds.append(kind)
                label = (
                    step.kernel if fused else f"rule {getattr(step.nodes[0].target, '__name__', step.nodes[0].target)}"
                )
                kernels[f"{label} ({kind})"] += now - last  # type: ignore[assignment]
            last = now

        self.engine.run(base, route.steps, seed, len(part), observe)
        signs = len(SCHEMES[self.scheme])
        each = signs / len(part)
        return Line(
            name,
            route.shape,
            len(where),
            len(route.suffix),
            " > ".join(_runs(kinds)) or "does not reach the loss",
            each * counter.get_total_flops(),
            route.block,
            route.bytes,
            each * (last - began),
            {label: each * seconds for label, seconds in kernels.items()},
            missing_rules(route.suffix),
        )


def _runs(kinds: list[str]) -> list[str]:
    """Consecutive repeats removed."""
    return [k for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k]
