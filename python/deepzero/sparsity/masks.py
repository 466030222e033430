"""Mask policies: random or fixed sets of coordinates, reproducible from a seed and the step alone."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MaskError
from ..estimators.base import Mask


class MaskPolicy(ABC):
    """Gives every step its mask; the same step always gets the same one."""

    @abstractmethod
    def sample(self, step: int) -> dict[str, Tensor]:
        """Parameter name -> bool tensor of that parameter's shape on the CPU, True where the step estimates."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors only, so that a checkpoint loads without executing code."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` saved."""


class _Redrawn(MaskPolicy):
    """A random mask that stays for ``every`` steps: draw number ``step // every`` of the stream ``seed``."""

    def __init__(self, every: int, seed: int) -> None:
        if every < 1:
            raise MaskError(f"a mask is drawn anew every k steps with k >= 1, got every={every}")
        self.every, self.seed = every, seed
        self._drawn: tuple[tuple[int, int], dict[str, Tensor]] | None = None

    def sample(self, step: int) -> dict[str, Tensor]:
        key = (self.seed, step // self.every)
        if self._drawn is None or self._drawn[0] != key:
            self._drawn = (key, self._draw(np.random.default_rng(key)))
        return dict(self._drawn[1])

    @abstractmethod
    def _draw(self, generator: np.random.Generator) -> dict[str, Tensor]: ...

    def state_dict(self) -> dict[str, Any]:
        return {"every": self.every, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.every, self.seed = state["every"], state["seed"]


class UniformRandom(_Redrawn):
    """A uniform draw over all coordinates of all parameters with requires_grad, exactly ``round((1 - sparsity) * n)``.

    ``sparsity`` is the fraction left out, in [0, 1); a new draw every ``every`` steps. Raises MaskError for a sparsity
    outside that range or one that leaves no coordinate.
    """

    def __init__(self, model: nn.Module, sparsity: float, every: int = 1, seed: int = 0) -> None:
        super().__init__(every, seed)
        self.sparsity = _fraction(sparsity, "sparsity")
        self._shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        self._total = sum(shape.numel() for shape in self._shapes.values())
        if self._kept() == 0:
            raise MaskError(
                f"sparsity={sparsity} leaves none of the model's {self._total:,} coordinates with requires_grad. Use "
                f"at most {max(0.0, 1 - 1 / max(self._total, 1)):.6g}."
            )

    def _kept(self) -> int:
        return _kept(self._total, self.sparsity)

    def _draw(self, generator: np.random.Generator) -> dict[str, Tensor]:
        flat = _choose(generator, self._total, self._kept())
        parts = torch.split(flat, [shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sparsity": self.sparsity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.sparsity = state["sparsity"]


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
            if _kept(total, _fraction(fraction, f"the ratio of {name!r}")) == 0:
                raise MaskError(
                    f"the ratio {fraction} prunes all {total} coordinates of {name!r}, which would then never be "
                    f"trained. Use at most {1 - 1 / total:.6g}, or freeze the parameter."
                )


class LayerwiseRandom(_Redrawn):
    """A uniform draw inside every parameter, exactly ``round((1 - ratio) * n)`` of its n coordinates.

    The paper's layer-wise pruning ratios with randomly re-drawn masks (its Algorithm 1); there a draw stays for an
    epoch, here for ``every`` steps.
    """

    def __init__(self, ratios: LayerRatios, every: int = 1, seed: int = 0) -> None:
        super().__init__(every, seed)
        self.ratios = ratios

    def _draw(self, generator: np.random.Generator) -> dict[str, Tensor]:
        masks = {}
        for name, fraction in self.ratios.pruned.items():
            shape = self.ratios.shapes[name]
            masks[name] = _choose(generator, shape.numel(), _kept(shape.numel(), fraction)).view(shape)
        return masks

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "pruned": dict(self.ratios.pruned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.ratios = LayerRatios(state["pruned"], self.ratios.shapes)


class Fixed(MaskPolicy):
    """The same mask at every step."""

    def __init__(self, mask: Mask) -> None:
        self._mask = dict(mask)

    def sample(self, step: int) -> dict[str, Tensor]:
        return dict(self._mask)

    def state_dict(self) -> dict[str, Any]:
        return {"mask": dict(self._mask)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mask = dict(state["mask"])


def _fraction(value: float, what: str) -> float:
    if not (math.isfinite(value) and 0 <= value < 1):
        raise MaskError(f"{what} must be the fraction left out, 0 <= fraction < 1, got {value}")
    return value


def _kept(total: int, pruned: float) -> int:
    return round((1 - pruned) * total)


def _choose(generator: np.random.Generator, total: int, kept: int) -> Tensor:
    flat = np.zeros(total, dtype=np.bool_)
    flat[generator.choice(total, kept, replace=False, shuffle=False)] = True
    return torch.from_numpy(flat)
