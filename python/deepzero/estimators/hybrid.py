"""Coordinate-wise and random gradient estimation in one: exact quotients where they matter, directions elsewhere."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import MaskError, did_you_mean
from ..evaluator import Evaluator
from ..objective import Mask, Objective, selected
from .options import RandomOptions
from .rge import RGE

if TYPE_CHECKING:
    from typing_extensions import Unpack


class HybridGE(RGE):
    """CGE on the chosen coordinates, RGE on the others: the reduction of queries that the paper leaves to future work.

    g_i = (L(w + mu e_i) - L(w)) / mu                            for the chosen coordinates i
    g_j = (1/q) sum_k (L(w + mu u_k) - L(w)) / mu * u_k[j]       for the others, along which alone every u_k moves

    Both parts share one base pass and are, bit for bit, what CGE and RGE give for their part of the mask. An estimate
    takes one query (scheme="central": two) for each chosen coordinate of the mask and for each direction, and one for
    the base loss; a mask that leaves one part empty makes no query for it.

    coordinates  names or patterns of parameters ("*.bias", "layers.0.*"), or a mask, for CGE

    Raises MaskError for a pattern that no trainable parameter matches, and where CGE or RGE would have nothing to do.
    Other arguments and errors as in :class:`RGE`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        coordinates: str | Sequence[str] | Mask = "*bias",
        **options: Unpack[RandomOptions],
    ) -> None:
        super().__init__(model, objective, **options)
        self.coordinates = _chosen(model, coordinates)

    def _parts(self, selected: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The chosen coordinates of a selection, and the others; a parameter without any is left out."""
        chosen, others = {}, {}
        for name, where in selected.items():
            inside = torch.zeros(len(where), dtype=torch.bool, device=where.device)
            if name in self.coordinates:
                inside = self.coordinates[name].to(where.device)[tuple(where.unbind(1))].reshape(-1)
            if bool(inside.any()):
                chosen[name] = where[inside]
            if not bool(inside.all()):
                others[name] = where[~inside]
        return chosen, others

    def moves(self, selected: dict[str, Tensor]) -> int:
        chosen, others = self._parts(selected)
        return sum(map(len, chosen.values())) + (super().moves(others) if others else 0)

    def gradients(self, evaluator: Evaluator, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        chosen, others = self._parts(selected)
        exact = self.along_coordinates(evaluator, chosen)
        random = super().gradients(evaluator, others) if others else {}
        grads = self._empty_grads(selected)
        for part in (exact, random):
            for name, grad in part.items():
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
