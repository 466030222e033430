"""The mask policy of a configuration, and what it is made from: layer-wise ratios and costs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DeepZeroError, MaskError
from ..estimators import Objective
from ..objective import Mask
from ..sparsity import (
    SCORES,
    CostAware,
    Fixed,
    LayerRatios,
    LayerwiseRandom,
    MaskPolicy,
    Schedule,
    Scores,
    UniformRandom,
    best_mask,
    layer_ratios,
    parameter_names,
)
from .config import Config, SparsityScheduleSection, SparsitySection
from .factories import checked_options, chosen


@dataclass(frozen=True)
class MaskInputs:
    """What a mask policy is made from and a run finds out once.

    ratios   layer-wise ratios
    best     the coordinates that their score ranks best, which sparse weights keep; None without a score
    costs    of one query by parameter name
    queries  loss values that a score spent on the ratios
    """

    ratios: LayerRatios | None = None
    best: Mask | None = None
    costs: Mapping[str, float] | None = None
    queries: int = 0


@dataclass(frozen=True)
class Draw:
    """What every random policy takes."""

    every: int
    seed: int
    always_on: tuple[str, ...]
    sparsity: float | Schedule


def _uniform(model: nn.Module, draw: Draw, inputs: MaskInputs) -> MaskPolicy:
    return UniformRandom(model, draw.sparsity, draw.every, draw.seed, always_on=draw.always_on)


def _layerwise(model: nn.Module, draw: Draw, inputs: MaskInputs) -> MaskPolicy:
    assert inputs.ratios is not None
    sparsity = draw.sparsity if isinstance(draw.sparsity, Schedule) else None  # a fraction is in the ratios
    return LayerwiseRandom(inputs.ratios, draw.every, draw.seed, sparsity=sparsity, always_on=draw.always_on)


def _fixed(model: nn.Module, draw: Draw, inputs: MaskInputs) -> MaskPolicy:
    policy = _uniform if inputs.ratios is None else _layerwise
    return Fixed(policy(model, draw, inputs).sample(0))


def _cost_aware(
    model: nn.Module, draw: Draw, inputs: MaskInputs, *, exponent: float = 0.5, budget: str = "queries"
) -> MaskPolicy:
    assert inputs.costs is not None
    return CostAware(
        model,
        draw.sparsity,
        inputs.costs,
        exponent=exponent,
        budget=budget,
        ratios=inputs.ratios,
        every=draw.every,
        seed=draw.seed,
        always_on=draw.always_on,
    )


POLICIES: dict[str, Callable[..., MaskPolicy]] = {
    "uniform": _uniform,
    "layerwise": _layerwise,
    "fixed": _fixed,
    "cost-aware": _cost_aware,
}
"""sparsity.policy -> what makes it; keyword arguments are sparsity.options."""

_RATIO_OPTIONS = ("keep", "least")
"""Options of :func:`layer_ratios` among sparsity.score_options."""

NAMED_SCORES = {name.replace("_", "-"): score for name, score in SCORES.items()}
"""sparsity.ratios -> score; its keyword arguments, and those of layer_ratios, are sparsity.score_options."""


def check_sparsity(config: Config) -> None:
    """Raise ConfigError where keys of ``[sparsity]`` contradict each other; needs neither data nor model."""
    section = config.sparsity
    make = chosen("sparsity", section.policy, POLICIES, key="policy")
    checked_options("sparsity", section.policy, make, section.options, reserved=("model", "draw", "inputs"))
    if section.ratios is not None and not is_file(section.ratios):
        _score_options(config)
    fixed, schedule = section.policy == "fixed", section.schedule
    refused = [
        (
            section.policy == "layerwise" and section.ratios is None,
            "sparsity.policy = 'layerwise' draws by layer-wise ratios and sparsity.ratios gives none. Name a score, or "
            "a file of ratios.",
        ),
        (
            bool(section.score_options) and (section.ratios is None or is_file(section.ratios)),
            "sparsity.score_options are for a score, and sparsity.ratios names none. Leave them out, or name a score.",
        ),
        (
            section.policy == "uniform" and section.ratios is not None,
            f"sparsity.ratios = {section.ratios!r} has no use in a draw over all coordinates. Set sparsity.policy = "
            "'layerwise', 'fixed' or 'cost-aware', or leave ratios out.",
        ),
        (
            section.policy != "cost-aware" and section.costs is not None,
            f"sparsity.costs = {section.costs!r} is for sparsity.policy = 'cost-aware', got {section.policy!r}. Leave "
            "costs out, or change the policy.",
        ),
        (
            fixed and section.every != 1,
            f"sparsity.every = {section.every!r}: a fixed mask is never drawn anew. Leave every out, or use another "
            "sparsity.policy.",
        ),
        (
            fixed and schedule.name != "constant",
            f"sparsity.schedule.name = {schedule.name!r}: a fixed mask cannot follow a schedule. Leave the schedule "
            "out, or use another sparsity.policy.",
        ),
        (
            section.weights == "sparse" and not fixed,
            f"sparsity.weights = 'sparse' keeps the weights outside one mask at zero, and sparsity.policy = "
            f"{section.policy!r} draws new masks. Set sparsity.policy = 'fixed'.",
        ),
        (
            config.estimator.name == "stale" and (section.momentum == "masked" or section.weights == "sparse"),
            "estimator.name = 'stale' moves what the mask leaves out by its last quotients, and sparsity.momentum = "
            "'masked' (so too weights = 'sparse') holds it still. Leave one of them out.",
        ),
        (
            schedule.name == "constant" and schedule != SparsityScheduleSection(),
            "sparsity.schedule.name = 'constant' has no start, begin_epoch or epochs: sparsity.fraction is all of it. "
            "Leave them out, or name linear, cosine or cubic.",
        ),
        (
            schedule.begin_epoch + (schedule.epochs or 0) > config.epochs or schedule.begin_epoch >= config.epochs,
            f"sparsity.schedule begins at epoch {schedule.begin_epoch:g} and takes "
            f"{'the rest' if schedule.epochs is None else format(schedule.epochs, 'g')}, the run only has "
            f"{config.epochs} epochs. Lower begin_epoch or epochs of the schedule, or raise epochs.",
        ),
    ]
    for wrong, text in refused:
        if wrong:
            raise ConfigError(text)


def build_masks(config: Config, model: nn.Module, steps_per_epoch: int, inputs: MaskInputs) -> MaskPolicy:
    """The configured policy for ``model``; ConfigError for values that do not suit it."""
    section = config.sparsity
    patterns = [*section.always_on, *(("norm", "bias") if section.weights == "sparse" else ())]
    try:
        draw = Draw(
            every=steps_per_epoch if section.every == "epoch" else int(section.every),
            seed=config.seed,
            always_on=parameter_names(model, *patterns),
            sparsity=_sparsity(section, config.epochs, steps_per_epoch),
        )
        if section.weights == "sparse" and inputs.best is not None:
            whole = {name: torch.ones_like(inputs.best[name]) for name in draw.always_on}
            return Fixed({**inputs.best, **whole})
        return POLICIES[section.policy](model, draw, inputs, **section.options)
    except (MaskError, TypeError) as refused:
        raise ConfigError(f"[sparsity] does not suit the model: {refused}") from refused


def _sparsity(section: SparsitySection, epochs: int, steps_per_epoch: int) -> float | Schedule:
    own = section.schedule
    if own.name == "constant":
        return section.fraction
    begin = round(own.begin_epoch * steps_per_epoch)
    steps = epochs * steps_per_epoch - begin if own.epochs is None else round(own.epochs * steps_per_epoch)
    return Schedule(own.name, own.start, section.fraction, max(1, steps), begin)


def is_file(ratios: str) -> bool:
    """Whether ``sparsity.ratios`` is the path of a file, not the name of a score."""
    return ratios.endswith(".json")


def read_ratios(path: Path, model: nn.Module) -> LayerRatios:
    try:
        return LayerRatios.load(path, model)
    except MaskError as refused:
        raise ConfigError(f"sparsity.ratios: {refused}") from refused


def checked_ratios(ratios: LayerRatios, section: SparsitySection) -> LayerRatios:
    """``ratios`` that agree with ``sparsity.fraction``, to two decimals, over the parameters that they prune at all."""
    sizes = {name: ratios.shapes[name].numel() for name, pruned in ratios.pruned.items() if pruned}
    total = sum(sizes.values())
    fraction = sum(ratios.pruned[name] * size for name, size in sizes.items()) / max(total, 1)
    if abs(fraction - section.fraction) > 0.005:
        raise ConfigError(
            f"sparsity.ratios = {section.ratios!r} leave out {fraction:.4g} of the parameters that they prune, and "
            f"sparsity.fraction = {section.fraction:g}. Set sparsity.fraction = {fraction:.2g}, or give other ratios."
        )
    return ratios


def scored(
    config: Config, model: nn.Module, objective: Objective, batch: Any
) -> tuple[LayerRatios, dict[str, Tensor], int]:
    """Ratios by the configured score, the best-scored coordinates that they count, and the loss values spent on it.

    Vectors (biases, scales and shifts of norms) and what is always on are left whole and not counted.
    """
    section = config.sparsity
    score, for_score, for_ratios = _score_options(config)
    try:
        vectors = {name for name, p in model.named_parameters() if p.requires_grad and p.dim() < 2}
        protect = vectors.union(parameter_names(model, *section.always_on))
        scores = score(model, objective, batch, **for_score)
        ratios = layer_ratios(scores, section.fraction, protect=protect, **for_ratios)
        keep = {key: value for key, value in for_ratios.items() if key == "keep"}
        return ratios, best_mask(scores, ratios, **keep), scores.queries
    except (DeepZeroError, TypeError, ValueError) as refused:
        raise ConfigError(f"sparsity.ratios = {section.ratios!r} does not suit the model: {refused}") from refused


def options_by_score(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each of several scores those of ``options`` that it takes; one that none of them takes is left for all.

    Raises ConfigError for an unknown score.
    """
    takes = {}
    for name in names:
        score = chosen("sparsity", name, NAMED_SCORES, key="ratios")
        takes[name] = {*_RATIO_OPTIONS, *inspect.signature(score).parameters}
    known = set().union(*takes.values())
    return {name: {k: v for k, v in options.items() if k in takes[name] or k not in known} for name in names}


def _score_options(config: Config) -> tuple[Callable[..., Scores], dict[str, Any], dict[str, Any]]:
    """The configured score, and its options apart from those of :func:`layer_ratios`."""
    name, options = str(config.sparsity.ratios), config.sparsity.score_options
    score = chosen("sparsity", name, NAMED_SCORES, key="ratios")
    for_ratios = {key: value for key, value in options.items() if key in _RATIO_OPTIONS}
    rest = {key: value for key, value in options.items() if key not in for_ratios}
    reserved = ("model", "objective", "batch")
    checked = checked_options("sparsity", name, score, rest, reserved=reserved, key="score_options")
    if "seed" in inspect.signature(score).parameters:
        checked = {"seed": config.seed, **checked}
    return score, checked, for_ratios


def write_costs(costs: Mapping[str, float], path: Path) -> None:
    path.write_text(json.dumps(dict(costs), indent=2) + "\n", encoding="utf-8")


def read_costs(path: Path) -> dict[str, float]:
    """Costs of one query by parameter name, from a JSON object; ConfigError when the file is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(cost) for name, cost in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as broken:
        raise ConfigError(
            f"{path}: expected a JSON object of parameter name -> cost of a query, reading it failed with: {broken}"
        ) from broken
