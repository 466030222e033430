"""Coordinate-wise gradient estimation (Chen et al., ICLR 2024, eq. 2): one finite difference per coordinate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..engine import Captured, Prepared
from ..objective import Mask
from .engine_estimator import EngineEstimator
from .profile import Plan, profile


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

    def _gradients(self, ready: Prepared, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        grads = self._empty_grads(selected)
        self._check_steps(ready, selected)
        for name, where in selected.items():
            for part, quotients in ready.evaluator.coordinates(name, where, self.mu, self.signs):
                grads[name][tuple(part.unbind(1))] = quotients.to(grads[name].dtype)
        return grads

    def plan(self, batch: Any, mask: Mask | None = None) -> Plan:
        """What :meth:`estimate` would do with this batch and mask, timed on one block per parameter. Pure."""
        selected = self.engine.selected(mask)
        with self.engine.prepared(batch) as ready:
            evaluator = ready.evaluator
            lines = profile(evaluator, selected, self.mu, self.signs) if isinstance(evaluator, Captured) else []
            return Plan(lines, self._count(selected), self.engine.precision, ready.reason, ready.capture_seconds)
