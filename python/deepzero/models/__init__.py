"""Networks of the field's experiments, and their names for the command line."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import ConfigError
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


def build(name: str, *, in_channels: int, image_size: int, num_classes: int, **options: Any) -> nn.Module:
    """The model ``name`` for square images; ``options`` are the factory's own keyword arguments.

    Raises ConfigError for an unknown name or option, naming the nearest valid one.
    """
    if name not in MODELS:
        raise ConfigError(f"model.name = {name!r} is unknown.{_near(name, list(MODELS))} Known: {', '.join(MODELS)}.")
    accepted = list(inspect.signature(MODELS[name]).parameters)
    shape = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
    for key in options:
        if key not in accepted or key in shape:
            free = [k for k in accepted if k not in shape]
            raise ConfigError(
                f"model.options.{key} is not an option of {name}.{_near(key, free)} Options: "
                f"{', '.join(free) or 'none'}."
            )
    return MODELS[name](**{k: v for k, v in shape.items() if k in accepted}, **options)


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


__all__ = [
    "MODELS",
    "build",
    "mlp",
    "paper_cnn",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "vit",
]
