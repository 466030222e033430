"""Scores that never evaluate the objective. They take the same arguments as the others, and look at the model alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..objective import selected
from .scores import Scores


def magnitude(model: nn.Module, objective: Any = None, batch: Any = None) -> Scores:
    """|theta|."""
    return _each(model, lambda p: p.abs())


def random(model: nn.Module, objective: Any = None, batch: Any = None, *, seed: int = 0) -> Scores:
    """Uniform in [0, 1) for every coordinate: about the same ratio everywhere; :func:`uniform` makes it the same."""
    generator = torch.Generator().manual_seed(seed)
    return _each(model, lambda p: torch.rand(p.shape, generator=generator))


def uniform(model: nn.Module, objective: Any = None, batch: Any = None, *, seed: int = 0) -> Scores:
    """The same ratio in every parameter, up to rounding; which coordinates is random."""
    return _densities(model, lambda shape: 1.0, seed)


def erk(model: nn.Module, objective: Any = None, batch: Any = None, *, seed: int = 0) -> Scores:
    """Erdos-Renyi-Kernel (Evci et al., ICML 2020): density proportional to sum(shape) / prod(shape), at most 1.

    For a convolution that is (out + in + kh + kw) / (out in kh kw). Which coordinates is random.
    """
    return _densities(model, lambda shape: max(sum(shape), 1) / math.prod(shape), seed)


def data_free(model: nn.Module, objective: Any = None, batch: Any = None, *, seed: int = 0) -> Scores:
    """|theta * z| / sqrt(n) with z ~ N(0, 1) and n the parameter's number of coordinates.

    What ZO-GraSP of the paper's published code amounts to: its random directions are scaled to the same length in every
    layer, and its two estimates share none of them, so no derivative is left in their difference.
    """
    generator = torch.Generator().manual_seed(seed)
    return _each(model, lambda p: (p * torch.randn(p.shape, generator=generator)).abs() / math.sqrt(p.numel()))


def _each(model: nn.Module, score: Callable[[Tensor], Tensor]) -> Scores:
    """``score`` of every trainable parameter, computed in float64 on the CPU and kept on the parameter's device."""
    parameters = {name: model.get_parameter(name).detach() for name in selected(model, None)}
    return Scores({name: score(p.cpu().double()).to(p.device) for name, p in parameters.items()})


def _densities(model: nn.Module, density: Callable[[torch.Size], float], seed: int) -> Scores:
    """Scores whose k largest leave every parameter a density proportional to the given one, for every k.

    Number r of n in a random order of the parameter scores density / ((r + 1/2) / n): above a threshold t lie those
    with (r + 1/2) / n < density / t, which is never more than all of them.
    """
    generator = torch.Generator().manual_seed(seed)

    def score(p: Tensor) -> Tensor:
        rank = torch.randperm(p.numel(), generator=generator).double().reshape(p.shape)
        return density(p.shape) * p.numel() / (rank + 0.5)

    return _each(model, score)
