"""Which coordinates each step estimates: scores, layer-wise ratios from them, and masks drawn from the ratios."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .data_free import data_free, erk, magnitude, random, uniform
from .first_order import grasp, snip, synflow
from .masks import CostAware, Fixed, LayerwiseRandom, MaskPolicy, UniformRandom, parameter_names, prune
from .ratios import LayerRatios, best_mask, layer_ratios
from .schedules import Schedule
from .scores import (
    Scores,
    zo_grasp,
    zo_grasp_cge,
    zo_grasp_layerwise,
    zo_snip,
    zo_snip_cge,
    zo_snip_layerwise,
    zo_synflow,
    zo_synflow_cge,
)

SCORES: dict[str, Callable[..., Scores]] = {
    score.__name__: score
    for score in (
        zo_grasp,
        zo_grasp_layerwise,
        zo_grasp_cge,
        zo_snip,
        zo_snip_layerwise,
        zo_snip_cge,
        zo_synflow,
        zo_synflow_cge,
        grasp,
        snip,
        synflow,
        magnitude,
        random,
        uniform,
        erk,
        data_free,
    )
}
"""name -> score."""


def score_options(name: str, **options: Any) -> dict[str, Any]:
    """Those of ``options`` that the score ``name`` takes: a score by differences takes mu, one by chance a seed."""
    accepted = inspect.signature(SCORES[name]).parameters
    return {key: value for key, value in options.items() if key in accepted}


__all__ = [
    "SCORES",
    "CostAware",
    "Fixed",
    "LayerRatios",
    "LayerwiseRandom",
    "MaskPolicy",
    "Schedule",
    "Scores",
    "UniformRandom",
    "best_mask",
    "data_free",
    "erk",
    "grasp",
    "layer_ratios",
    "magnitude",
    "parameter_names",
    "prune",
    "random",
    "score_options",
    "snip",
    "synflow",
    "uniform",
    "zo_grasp",
    "zo_grasp_cge",
    "zo_grasp_layerwise",
    "zo_snip",
    "zo_snip_cge",
    "zo_snip_layerwise",
    "zo_synflow",
    "zo_synflow_cge",
]
