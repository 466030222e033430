"""Coordinate-wise and random gradient estimation in one: exact quotients where they matter, directions elsewhere."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Prepared
from ..errors import MaskError, did_you_mean
from ..objective import Mask, Objective, selected
from .cge import CGE
from .engine_estimator import EngineEstimator
from .rge import RGE


class HybridGE(EngineEstimator):
    """CGE on the chosen coordinates, RGE on the others: the reduction of queries that the paper leaves to future work.

    g_i = (L(w + mu e_i) - L(w)) / mu                            for the chosen coordinates i
    g_j = (1/q) sum_k (L(w + mu u_k) - L(w)) / mu * u_k[j]       for the others, along which alone every u_k moves

    Both parts share one base pass and are, bit for bit, what CGE and RGE give for their part of the mask. An estimate
    takes one query (scheme="central": two) for each chosen coordinate of the mask and for each direction, and one for
    the base loss; a mask that leaves one part empty makes no query for it.

    coordinates  names or patterns of parameters ("*.bias", "layers.0.*"), or a mask, for CGE
    queries, distribution, seed  of the directions, as in :class:`RGE`

    Raises MaskError for a pattern that no trainable parameter matches, and where CGE or RGE would have nothing to do.
    Other arguments and errors as in :class:`EngineEstimator`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        coordinates: str | Sequence[str] | Mask = "*bias",
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
        self.cge = CGE(model, objective, mu=mu, scheme=scheme, precision=precision)
        self.rge = RGE(
            model,
            objective,
            queries=queries,
            distribution=distribution,
            mu=mu,
            scheme=scheme,
            seed=seed,
            precision=precision,
        )
        self.cge.engine = self.rge.engine = self.engine
        self.coordinates = _chosen(model, coordinates)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"estimates": self.rge.estimates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.rge.estimates = int(state["estimates"])

    def _done(self, queries: int) -> None:
        super()._done(queries)
        self.rge.estimates += 1

    def _parts(self, chosen: dict[str, Tensor]) -> list[tuple[EngineEstimator, dict[str, Tensor]]]:
        """Each estimator with its own coordinates, where it has any."""
        ours, others = {}, {}
        for name, where in chosen.items():
            inside = torch.zeros(len(where), dtype=torch.bool, device=where.device)
            if name in self.coordinates:
                inside = self.coordinates[name].to(where.device)[tuple(where.unbind(1))].reshape(-1)
            ours[name], others[name] = where[inside], where[~inside]
        parts: list[tuple[EngineEstimator, dict[str, Tensor]]] = [(self.cge, ours), (self.rge, others)]
        kept = [(part, {name: where for name, where in mine.items() if len(where)}) for part, mine in parts]
        return [(part, mine) for part, mine in kept if mine]

    def _count(self, chosen: dict[str, Tensor]) -> int:
        return 1 + sum(part._count(mine) - 1 for part, mine in self._parts(chosen))

    def _gradients(self, ready: Prepared, chosen: dict[str, Tensor]) -> dict[str, Tensor]:
        grads = self._empty_grads(chosen)
        for part, mine in self._parts(chosen):
            for name, grad in part._gradients(ready, mine).items():
                grads[name] += grad  # zero outside of the part
        return grads


def _chosen(model: nn.Module, coordinates: str | Sequence[str] | Mask) -> dict[str, Tensor]:
    """Parameter name -> bool tensor of its shape, True where CGE is to be used."""
    every = selected(model, None)
    if isinstance(coordinates, Mapping):
        chosen = selected(model, coordinates)
    else:
        patterns = [coordinates] if isinstance(coordinates, str) else list(coordinates)
        chosen = {}
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(
                    "coordinates must be a parameter's name, a pattern, a list of them or a mask, got "
                    f"{type(pattern).__name__} among them"
                )
            names = fnmatch.filter(every, pattern)
            if not names:
                hint = did_you_mean(pattern, every, f"They are: {', '.join(list(every)[:12])}.")
                raise MaskError(f"coordinates: no parameter that requires grad matches {pattern!r}.{hint}")
            chosen |= {name: every[name] for name in names}
    if not chosen:
        raise MaskError("coordinates names nothing, so all would be left to random directions: use dz.RGE.")
    if all(name in chosen and bool(chosen[name].all()) for name in every):
        raise MaskError("coordinates takes in every weight, so none is left to random directions: use dz.CGE.")
    return chosen
