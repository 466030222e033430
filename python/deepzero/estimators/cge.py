"""Coordinate-wise gradient estimation (Chen et al., ICLR 2024, eq. 2): one finite difference per coordinate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..engine import Captured
from ..evaluator import Evaluator
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

    def moves(self, selected: dict[str, Tensor]) -> int:
        return sum(map(len, selected.values()))

    def gradients(self, evaluator: Evaluator, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.along_coordinates(evaluator, selected)

    def plan(self, batch: Any, mask: Mask | None = None) -> Plan:
        """What :meth:`estimate` would do with this batch and mask, timed on one block per parameter. Pure."""
        self.engine.initialise(batch)
        selected = self.engine.selected(mask)
        queries = 1 + len(self.signs) * self.moves(selected)
        with self.engine.prepared(batch) as ready:
            evaluator = ready.evaluator
            lines = profile(evaluator, selected, self.mu, self.signs) if isinstance(evaluator, Captured) else []
            return Plan(lines, queries, self.engine.precision, ready.reason, ready.capture_seconds)
