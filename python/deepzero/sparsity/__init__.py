"""Which coordinates each step estimates."""

from .masks import CostAware, Fixed, LayerwiseRandom, MaskPolicy, UniformRandom, parameter_names, prune
from .ratios import LayerRatios
from .schedules import Schedule

__all__ = [
    "CostAware",
    "Fixed",
    "LayerRatios",
    "LayerwiseRandom",
    "MaskPolicy",
    "Schedule",
    "UniformRandom",
    "parameter_names",
    "prune",
]
