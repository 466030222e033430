"""Gradient estimators behind one interface."""

from ..objective import Mask, Objective
from .cge import CGE
from .engine_estimator import EngineEstimator
from .hybrid import HybridGE
from .interface import Estimate, Estimator, StepResult
from .layerwise import LayerwiseRGE
from .rge import RGE
from .stale import StaleGE

ESTIMATORS: dict[str, type[Estimator]] = {
    "cge": CGE,
    "rge": RGE,
    "layerwise": LayerwiseRGE,
    "hybrid": HybridGE,
    "stale": StaleGE,
}
"""name in a configuration -> estimator. A row of your own makes it known to configurations and to the tests."""

__all__ = [
    "CGE",
    "ESTIMATORS",
    "RGE",
    "EngineEstimator",
    "Estimate",
    "Estimator",
    "HybridGE",
    "LayerwiseRGE",
    "Mask",
    "Objective",
    "StaleGE",
    "StepResult",
]
