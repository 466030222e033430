"""Mask policies: random or fixed sets of coordinates, reproducible from a seed and the step alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MaskError
from ..estimators.base import Mask
from .ratios import LayerRatios, fraction_left_out, kept_count


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
        self.sparsity = fraction_left_out(sparsity, "sparsity")
        self._shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        self._total = sum(shape.numel() for shape in self._shapes.values())
        if self._kept() == 0:
            raise MaskError(
                f"sparsity={sparsity} leaves none of the model's {self._total:,} coordinates with requires_grad. Use "
                f"at most {max(0.0, 1 - 1 / max(self._total, 1)):.6g}."
            )

    def _kept(self) -> int:
        return kept_count(self._total, self.sparsity)

    def _draw(self, generator: np.random.Generator) -> dict[str, Tensor]:
        flat = _choose(generator, self._total, self._kept())
        parts = torch.split(flat, [shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sparsity": self.sparsity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.sparsity = state["sparsity"]


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
            masks[name] = _choose(generator, shape.numel(), kept_count(shape.numel(), fraction)).view(shape)
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


def _choose(generator: np.random.Generator, total: int, kept: int) -> Tensor:
    flat = np.zeros(total, dtype=np.bool_)
    flat[generator.choice(total, kept, replace=False, shuffle=False)] = True
    return torch.from_numpy(flat)
