"""Gradient estimators behind one interface."""

from ..objective import Mask, Objective
from .cge import CGE
from .engine_estimator import EngineEstimator
from .hybrid import HybridGE
from .interface import Estimate, Estimator, StepResult
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
