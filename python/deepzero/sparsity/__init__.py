"""Which coordinates each step estimates."""

from .masks import Fixed, LayerwiseRandom, MaskPolicy, UniformRandom
from .ratios import LayerRatios

__all__ = ["Fixed", "LayerRatios", "LayerwiseRandom", "MaskPolicy", "UniformRandom"]
