"""Gradient estimators behind one interface."""

from .base import Estimate, Estimator, Mask, Objective, StepResult
from .cge import CGE
from .rge import RGE

__all__ = ["CGE", "RGE", "Estimate", "Estimator", "Mask", "Objective", "StepResult"]
