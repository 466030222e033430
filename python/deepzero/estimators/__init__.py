"""Gradient estimators behind one interface."""

from .base import Estimate, Estimator, Mask, Objective, StepResult
from .cge import CGE
from .engine_estimator import EngineEstimator
from .rge import RGE

__all__ = ["CGE", "RGE", "EngineEstimator", "Estimate", "Estimator", "Mask", "Objective", "StepResult"]
