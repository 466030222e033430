"""Zeroth-order training of neural networks from function values alone.

The pieces a training script needs are here; everything else lives in the submodule that is named after it.
"""

from . import data, errors, models, sparsity
from .baselines import ForwardGE
from .blackbox import BlackBox, blackbox
from .estimators import CGE, RGE, Estimate, Estimator, HybridGE, LayerwiseRGE, StaleGE, StepResult
from .training import Trainer

__version__ = "0.1.0"

__all__ = [
    "CGE",
    "RGE",
    "BlackBox",
    "Estimate",
    "Estimator",
    "ForwardGE",
    "HybridGE",
    "LayerwiseRGE",
    "StaleGE",
    "StepResult",
    "Trainer",
    "blackbox",
    "data",
    "errors",
    "models",
    "sparsity",
]
