"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(
    in_channels: int = 1, image_size: int = 28, num_classes: int = 10, hidden: Sequence[int] = (64, 64)
) -> nn.Sequential:
    """Flatten, then Linear + ReLU per entry of ``hidden``, then Linear.

    Input [n, in_channels, image_size, image_size]; output logits [n, num_classes].
    """
    sizes = [in_channels * image_size**2, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))
