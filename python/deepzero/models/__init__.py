"""Networks of the field's experiments, and their names for the command line."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .cnn import paper_cnn
from .mlp import mlp
from .resnet import resnet20, resnet32, resnet44, resnet56, resnet110
from .vit import vit

MODELS: dict[str, Callable[..., nn.Module]] = {
    "paper-cnn": paper_cnn,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "mlp": mlp,
    "vit": vit,
}

__all__ = [
    "MODELS",
    "mlp",
    "paper_cnn",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "vit",
]
