"""Layer-wise pruning ratios: how much of each parameter is left out, with exact counts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import MaskError


def fraction_left_out(value: float, what: str) -> float:
    """``value`` itself; MaskError when it is no fraction in [0, 1)."""
    if not (math.isfinite(value) and 0 <= value < 1):
        raise MaskError(f"{what} must be the fraction left out, 0 <= fraction < 1, got {value}")
    return value


def kept_count(total: int, pruned: float) -> int:
    """How many of ``total`` coordinates a pruned fraction leaves."""
    return round((1 - pruned) * total)


@dataclass(frozen=True)
class LayerRatios:
    """How much of each parameter is left out: its pruned fraction in [0, 1) and its shape, by parameter name."""

    pruned: Mapping[str, float]
    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, model: nn.Module, pruned: Mapping[str, float]) -> LayerRatios:
        """Ratios for ``model``; parameters with requires_grad that ``pruned`` does not name keep every coordinate.

        Raises MaskError for unknown or frozen names, fractions outside [0, 1) and a parameter pruned to nothing.
        """
        shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        for name in pruned:
            if name not in shapes:
                near = difflib.get_close_matches(name, shapes, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise MaskError(
                    f"the ratios name {name!r}, which is no parameter of the model with requires_grad.{hint}"
                )
        return cls({name: pruned.get(name, 0.0) for name in shapes}, shapes)

    def __post_init__(self) -> None:
        for name, fraction in self.pruned.items():
            total = self.shapes[name].numel()
            if kept_count(total, fraction_left_out(fraction, f"the ratio of {name!r}")) == 0:
                raise MaskError(
                    f"the ratio {fraction} prunes all {total} coordinates of {name!r}, which would then never be "
                    f"trained. Use at most {1 - 1 / total:.6g}, or freeze the parameter."
                )
