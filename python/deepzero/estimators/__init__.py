"""Gradient estimators behind one interface."""

from .base import Estimate, Estimator, Mask, Objective, StepResult
from .cge import CGE
from .engine_estimator import EngineEstimator
from .hybrid import HybridGE
from .rge import RGE
from .stale import StaleGE

__all__ = [
    "CGE",
    "RGE",
    "EngineEstimator",
    "Estimate",
    "Estimator",
    "HybridGE",
    "Mask",
    "Objective",
    "StaleGE",
    "StepResult",
]
