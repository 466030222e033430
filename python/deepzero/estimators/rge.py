"""Random gradient estimation: differences along random directions that move every selected weight at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..evaluator import Evaluator
from ..objective import Objective
from .directions import Directions
from .engine_estimator import EngineEstimator
from .options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, objective, **options)
        self.directions = Directions(queries, distribution, seed)

    def moves(self, selected: dict[str, Tensor]) -> int:
        self.directions.check(sum(map(len, selected.values())))
        return self.directions.count

    def gradients(self, evaluator: Evaluator, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.along_directions(evaluator, selected, self.directions, self.estimates)
