"""Coordinate-wise gradient estimation (Chen et al., ICLR 2024, eq. 2): one finite difference per coordinate."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import dzkernels

from ..base_pass import Base
from ..carriers import OneEntry, describe
from ..engine import Prepared
from ..fusion import Step
from ..objective import Mask, check_finite
from ..rules.registry import missing_rules
from .engine_estimator import EngineEstimator
from .profile import Line, Plan


class CGE(EngineEstimator):
    """Coordinate-wise finite differences, propagated exactly through the captured graph.

    g_i = (L(w + mu e_i) - L(w)) / mu           (scheme="forward", one query a coordinate)
    g_i = (L(w + mu e_i) - L(w - mu e_i)) / 2mu (scheme="central", two)

    Weights are never written, so mu is used exactly whatever the weights' dtype. Quotients match float64 quotients
    with the same step to about float32 rounding at any mu; the default is the paper's.

    Arguments and errors as in :class:`EngineEstimator`.
    """

    def _count(self, selected: dict[str, Tensor]) -> int:
        return 1 + len(self.signs) * sum(map(len, selected.values()))

    def _blocks(self, base: Base, name: str, where: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(coordinates [P, rank], quotients [P]) block by block."""
        engine = self.engine
        route = engine.route(base.graph, name)
        for part in where.split(route.block):
            if not route.suffix and base.graph.loss not in base.graph.placeholders(name):
                yield part, torch.zeros(len(part), dtype=torch.float64, device=part.device)
                continue

            def differences(step: float, part: Tensor = part) -> Tensor:
                return engine.differences(base, name, part, step)

            # the step a difference starts from is mu rounded to the query dtype; divide by that very number
            realised = float(torch.tensor(self.mu, dtype=engine.dtype))
            quotients = self._quotients(differences) * (self.mu / realised)
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
        for name, where in selected.items():
            for sign in self.signs:
                whole.check_step(name, where, sign * self.mu)
        for name, where in selected.items():
            for row in where:
                moved = [whole.move(name, row, sign * self.mu) for sign in self.signs]
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
        # torch counts its own ops only, which are what the reference kernels are made of
        with counter, dzkernels.use_backend("reference"):
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
        each = len(self.signs) / len(part)
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
