"""Mask policies: random or fixed sets of coordinates, reproducible from a seed and the step alone."""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MaskError, did_you_mean
from ..objective import Mask
from .ratios import LayerRatios, fraction_left_out, kept_count
from .schedules import Schedule, most_sparsity, sparsity_at, sparsity_of, sparsity_state


def norm_parameters(model: nn.Module) -> set[str]:
    """Scales and shifts of modules whose class is called a norm: BatchNorm2d, LayerNorm, LlamaRMSNorm, ..."""
    return {
        f"{module}.{name}" if module else name
        for module, found in model.named_modules()
        if "Norm" in type(found).__name__
        for name, _ in found.named_parameters(recurse=False)
    }


def bias_parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith("bias")}


GROUPS = {"norm": norm_parameters, "bias": bias_parameters}
"""name of a group of parameters -> those of a model"""


def parameter_names(model: nn.Module, *patterns: str) -> tuple[str, ...]:
    """Names of the parameters with requires_grad that any of ``patterns`` matches, in the model's order.

    A pattern is a group, "norm" (affine parameters of normalisation layers) or "bias", which a model may lack, or a
    shell-style pattern of names such as "head.*"; MaskError where such a one matches nothing.
    """
    known = [name for name, p in model.named_parameters() if p.requires_grad]
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern in GROUPS:
            chosen |= GROUPS[pattern](model)
            continue
        found = fnmatch.filter(known, pattern)
        if not found:
            hint = did_you_mean(pattern, [*GROUPS, *known], f"Parameters are: {', '.join(known[:12])}.")
            raise MaskError(f"{pattern!r} matches no parameter of the model with requires_grad.{hint}")
        chosen |= set(found)
    return tuple(name for name in known if name in chosen)


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
    """A random mask that stays for ``every`` steps: draw number ``step // every`` of the stream ``seed``.

    ``always_on`` names parameters that every mask selects whole, besides what is drawn from the others.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], every: int, seed: int, always_on: Collection[str]) -> None:
        if every < 1:
            raise MaskError(f"a mask is drawn anew every k steps with k >= 1, got every={every}")
        if seed < 0:
            raise MaskError(f"the seed of a mask policy is a whole number >= 0, got {seed}")
        for name in always_on:
            if name not in shapes:
                raise MaskError(
                    f"always_on names {name!r}, which is no parameter with requires_grad. deepzero.sparsity."
                    "parameter_names(model, pattern, ...) finds names, and knows the groups 'norm' and 'bias'."
                )
        if shapes and not shapes.keys() - set(always_on):
            raise MaskError("always_on names every parameter, which leaves nothing to draw. Pass mask=None instead.")
        self.every, self.seed, self.always_on = every, seed, tuple(always_on)
        self._shapes = dict(shapes)
        self._drawn: tuple[tuple[int, int], dict[str, Tensor]] | None = None

    @property
    def _drawn_shapes(self) -> dict[str, torch.Size]:
        return {name: shape for name, shape in self._shapes.items() if name not in self.always_on}

    def sample(self, step: int) -> dict[str, Tensor]:
        draw = step // self.every
        key = (self.seed, draw)
        if self._drawn is None or self._drawn[0] != key:
            mask = {name: torch.ones(self._shapes[name], dtype=torch.bool) for name in self.always_on}
            self._drawn = (key, mask | self._draw(np.random.default_rng(key), draw * self.every))
        return dict(self._drawn[1])

    @abstractmethod
    def _draw(self, generator: np.random.Generator, step: int) -> dict[str, Tensor]:
        """A mask over the parameters that are not always on; ``step`` is the first that uses it."""

    def state_dict(self) -> dict[str, Any]:
        return {"every": self.every, "seed": self.seed, "always_on": list(self.always_on)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.every, self.seed, self.always_on = state["every"], state["seed"], tuple(state["always_on"])
        self._drawn = None


class UniformRandom(_Redrawn):
    """A uniform draw over all coordinates of all parameters with requires_grad, exactly ``round((1 - sparsity) * n)``.

    sparsity   the fraction left out, in [0, 1), or a :class:`Schedule` of it, read at the first step of a draw
    every      steps that share a draw; the paper draws every epoch
    always_on  names of parameters that every mask selects whole; n then counts the others

    Raises MaskError for a sparsity outside that range, one that leaves no coordinate, and unknown names.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | Schedule,
        every: int = 1,
        seed: int = 0,
        *,
        always_on: Collection[str] = (),
    ) -> None:
        super().__init__(_trainable(model), every, seed, always_on)
        self.sparsity = _checked(sparsity)
        total, most = self._total, most_sparsity(sparsity)
        if kept_count(total, most) == 0:
            raise MaskError(
                f"sparsity={most} leaves none of the model's {total:,} coordinates with requires_grad. Use "
                f"at most {max(0.0, 1 - 1 / max(total, 1)):.6g}."
            )

    @property
    def _total(self) -> int:
        return sum(shape.numel() for shape in self._drawn_shapes.values())

    def _draw(self, generator: np.random.Generator, step: int) -> dict[str, Tensor]:
        shapes = self._drawn_shapes
        flat = _choose(generator, self._total, kept_count(self._total, sparsity_at(self.sparsity, step)))
        parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sparsity": sparsity_state(self.sparsity)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.sparsity = sparsity_of(state["sparsity"])


class LayerwiseRandom(_Redrawn):
    """A uniform draw inside every parameter, exactly ``round((1 - ratio) * n)`` of its n coordinates.

    The paper's layer-wise pruning ratios with randomly re-drawn masks (its Algorithm 1); there a draw stays for an
    epoch, here for ``every`` steps.

    sparsity   None: the ratios as they are. A fraction or a :class:`Schedule`: exactly ``round((1 - sparsity) * n)``
               of the n coordinates of all parameters that are not always on, divided among them in proportion to what
               the ratios keep of each, at least one and at most all of its own. Parameters whose ratio is 0 stay whole
               and are not among the n, unless all ratios are 0
    always_on  names of parameters that every mask selects whole, whatever their ratio

    Raises MaskError for a sparsity outside [0, 1), one that leaves some parameter nothing, and unknown names.
    """

    def __init__(
        self,
        ratios: LayerRatios,
        every: int = 1,
        seed: int = 0,
        *,
        sparsity: float | Schedule | None = None,
        always_on: Collection[str] = (),
    ) -> None:
        super().__init__(ratios.shapes, every, seed, always_on)
        self.ratios = ratios
        self.sparsity = None if sparsity is None else _checked(sparsity)
        if sparsity is not None:
            self._counts(most_sparsity(sparsity))

    @property
    def _sizes(self) -> dict[str, int]:
        return {name: shape.numel() for name, shape in self._drawn_shapes.items()}

    def _counts(self, sparsity: float) -> dict[str, int]:
        sizes, pruned = self._sizes, self.ratios.pruned
        whole = {name for name in sizes if pruned[name] == 0}
        shared = {name: size for name, size in sizes.items() if len(whole) == len(sizes) or name not in whole}
        kept = {name: (1 - pruned[name]) * size for name, size in shared.items()}
        return sizes | self._shared_out(kept, shared, sparsity)

    def _shared_out(self, kept: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
        """Counts at ``sparsity``; ``kept`` is what the ratios keep of each parameter, not rounded."""
        return allocate(kept, sizes, kept_count(sum(sizes.values()), sparsity))

    def counts(self, step: int) -> dict[str, int]:
        """Parameter name -> how many of its coordinates a draw at ``step`` selects; without those always on."""
        if self.sparsity is not None:
            return self._counts(sparsity_at(self.sparsity, step))
        return {name: kept_count(size, self.ratios.pruned[name]) for name, size in self._sizes.items()}

    def _draw(self, generator: np.random.Generator, step: int) -> dict[str, Tensor]:
        return {
            name: _choose(generator, self._shapes[name].numel(), count).view(self._shapes[name])
            for name, count in self.counts(step).items()
        }

    def state_dict(self) -> dict[str, Any]:
        sparsity = None if self.sparsity is None else sparsity_state(self.sparsity)
        return {**super().state_dict(), "pruned": dict(self.ratios.pruned), "sparsity": sparsity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.ratios = LayerRatios(state["pruned"], self.ratios.shapes)
        self.sparsity = None if state["sparsity"] is None else sparsity_of(state["sparsity"])


BUDGETS = ("queries", "cost")


class Priced(Protocol):
    """What knows the cost of one query by parameter, as a plan does."""

    @property
    def costs(self) -> Mapping[str, float]: ...


class CostAware(LayerwiseRandom):
    """A uniform draw inside every parameter, more of it where a query is cheap.

    With k of the n coordinates of a layer drawn, the estimate of its part of the gradient has a variance of about
    ``n^2 s^2 / k`` (scaled to be unbiased; s: root mean square of a coordinate's gradient). Least summed variance for
    a given ``sum of k * cost`` is at k in proportion to ``n s / sqrt(cost)``: Neyman's allocation with costs (Cochran,
    Sampling Techniques, section 5.5). Here n s is what ``ratios`` keep of a layer, and all of it without ratios.

    sparsity  the fraction left out, in [0, 1), or a :class:`Schedule` of it
    costs     of one query by parameter, in any unit: a mapping, or a plan (``estimator.plan(batch)``), whose seconds
              are measured: for the same masks again keep them, as a checkpoint does
    exponent  counts are in proportion to cost ** -exponent: 1/2 is optimal, 0 ignores costs, 1 spends alike on each
    budget    "queries": exactly ``round((1 - sparsity) * n)`` coordinates, as :class:`LayerwiseRandom` would draw, for
              less; "cost": as many as cost no more than ``(1 - sparsity)`` of an estimate of all, and leave of that no
              room for one more
    ratios    relative densities before costs count; None: alike everywhere

    Late layers then take part in more steps, which is a larger step size for them; masks do not rescale gradients.
    Raises MaskError as the other policies, and for costs that are missing, not positive or not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | Schedule,
        costs: Mapping[str, float] | Priced,
        *,
        exponent: float = 0.5,
        budget: str = "queries",
        ratios: LayerRatios | None = None,
        every: int = 1,
        seed: int = 0,
        always_on: Collection[str] = (),
    ) -> None:
        if not math.isfinite(exponent):
            raise MaskError(f"the exponent of a cost is a finite number, 0.5 is optimal, got {exponent}")
        if budget not in BUDGETS:
            raise MaskError(f"budget is one of {', '.join(map(repr, BUDGETS))}, got {budget!r}")
        self.exponent, self.budget = float(exponent), budget
        given = costs if isinstance(costs, Mapping) else costs.costs
        for name in _trainable(model):
            cost = given.get(name)
            if name not in always_on and (cost is None or not (math.isfinite(cost) and cost > 0)):
                raise MaskError(
                    f"a cost of one query, positive and finite, is needed for each parameter; that of {name!r} is "
                    f"{cost}. Give estimator.plan(batch), or add it to the mapping."
                )
        self.costs = dict(given)
        super().__init__(ratios or LayerRatios.of(model, {}), every, seed, sparsity=sparsity, always_on=always_on)

    def _shared_out(self, kept: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
        weights = {name: many * self.costs[name] ** -self.exponent for name, many in kept.items()}
        if self.budget == "queries":
            return super()._shared_out(weights, sizes, sparsity)
        spend = (1 - sparsity) * math.fsum(self.costs[name] * size for name, size in sizes.items())
        return allocate(weights, sizes, spend, self.costs)

    def state_dict(self) -> dict[str, Any]:
        own = {"costs": dict(self.costs), "exponent": self.exponent, "budget": self.budget}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.costs, self.exponent, self.budget = dict(state["costs"]), state["exponent"], state["budget"]


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


def prune(model: nn.Module, mask: Mask) -> None:
    """Set the weights outside ``mask`` to zero, in place: a sparse network, where other masks only thin its gradient.

    Raises MaskError, before any weight is written, for a parameter with requires_grad of which nothing would be left.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        if name not in mask or not bool(mask[name].any()):
            raise MaskError(
                f"the mask prunes all {parameter.numel():,} coordinates of {name!r}: nothing would pass. Keep some of "
                "it, or all (always_on), or freeze the parameter."
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.mul_(mask[name].to(parameter.device))


def allocate(
    weights: Mapping[str, float], sizes: Mapping[str, int], budget: float, costs: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Whole counts in proportion to ``weights``, each from 1 to its size, that use up ``budget``.

    The sum of count * cost (1 each without ``costs``) never exceeds ``budget``, and what is left of it pays for no
    further one. Rounding goes to the largest remainders, ties to the first. Raises MaskError when ``budget`` does not
    pay for one each.
    """
    price = {name: 1.0 if costs is None else costs[name] for name in sizes}
    if math.fsum(price.values()) > budget:
        raise MaskError(
            f"the sparsity leaves a budget of {budget:.6g}, less than one coordinate of each of {len(sizes)} parameters"
            f" takes ({math.fsum(price.values()):.6g}): some would never be trained. Lower it, or freeze parameters."
        )

    def shares(scale: float) -> dict[str, float]:
        return {name: min(max(scale * weights[name], 1.0), float(size)) for name, size in sizes.items()}

    def spent(counts: Mapping[str, float]) -> float:
        return math.fsum(price[name] * count for name, count in counts.items())

    low, high = 0.0, max(size / weights[name] for name, size in sizes.items())
    if spent(shares(high)) <= budget:
        low = high
    while low < (middle := (low + high) / 2) < high:  # until no number lies between
        low, high = (middle, high) if spent(shares(middle)) <= budget else (low, middle)
    ideal = shares(low)
    counts = {name: math.floor(share) for name, share in ideal.items()}
    for name in sorted(sizes, key=lambda name: counts[name] - ideal[name]):
        if counts[name] < sizes[name] and spent(counts) + price[name] <= budget:
            counts[name] += 1
    for name in sorted(sizes, key=lambda name: -price[name]):  # what rounding left of the budget
        counts[name] += min(sizes[name] - counts[name], math.floor((budget - spent(counts)) / price[name]))
    return counts


def _trainable(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def _checked(sparsity: float | Schedule) -> float | Schedule:
    return sparsity if isinstance(sparsity, Schedule) else fraction_left_out(sparsity, "sparsity")


def _choose(generator: np.random.Generator, total: int, kept: int) -> Tensor:
    flat = np.zeros(total, dtype=np.bool_)
    flat[generator.choice(total, kept, replace=False, shuffle=False)] = True
    return torch.from_numpy(flat)
