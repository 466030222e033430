"""Random directions that move one layer each: the same budget, without one layer's noise in another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..evaluator import Evaluator
from ..objective import Objective, selected
from ..state import parameter_of
from .directions import Directions
from .engine_estimator import EngineEstimator
from .options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LayerwiseRGE(EngineEstimator):
    """RGE for every layer apart: m = queries // layers Gaussian directions that move that layer only, one base pass.

    g_l = (1/m) sum_k (L(w + mu u_lk) - L(w)) / mu * u_lk     for layer l

    A layer is one parameter of two or more dimensions; all vectors and scalars together are one more. The squared error
    in a layer is (d_l + 1) / m of that layer's own squared gradient, where RGE spreads one noise level over all.

    queries  directions an estimate, shared equally; a layer without a coordinate in the mask makes none
    seed     directions follow from (seed, number of the estimate, layer) alone

    Raises ValueError for fewer queries than layers. Other arguments and errors as in :class:`EngineEstimator`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        queries: int = 192,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, objective, **options)
        names = list(selected(model, None))
        vectors = [name for name in names if parameter_of(model, name).dim() < 2]
        self.layers = [[name] for name in names if name not in vectors] + ([vectors] if vectors else [])
        if not isinstance(queries, int) or queries < len(self.layers):
            raise ValueError(
                f"queries must be at least one direction for each of the model's {len(self.layers)} layers, got "
                f"{queries!r}"
            )
        self.directions = Directions(queries // len(self.layers), "gaussian", seed)

    def _parts(self, selected: dict[str, Tensor]) -> list[tuple[int, dict[str, Tensor]]]:
        """(number of the layer, its part of the selection), for layers that have one."""
        parts = ({name: selected[name] for name in names if name in selected} for names in self.layers)
        return [(number, part) for number, part in enumerate(parts) if part]

    def moves(self, selected: dict[str, Tensor]) -> int:
        return self.directions.count * len(self._parts(selected))

    def gradients(self, evaluator: Evaluator, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        grads: dict[str, Tensor] = {}
        for number, part in self._parts(selected):
            draw = self.estimates * len(self.layers) + number
            grads |= self.along_directions(evaluator, part, self.directions, draw)
        return {name: grads[name] for name in selected}
