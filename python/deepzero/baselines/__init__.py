"""The two methods every result is compared with: the plain query loop and first-order gradients."""

from .backprop import Backprop
from .plain_loop import PlainLoop

__all__ = ["Backprop", "PlainLoop"]
