"""Which coordinates each step estimates."""

from .masks import Fixed, LayerRatios, LayerwiseRandom, MaskPolicy, UniformRandom

__all__ = ["Fixed", "LayerRatios", "LayerwiseRandom", "MaskPolicy", "UniformRandom"]
