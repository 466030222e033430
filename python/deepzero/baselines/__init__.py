"""What every result is compared with: the plain query loop, first-order gradients and forward gradients."""

from .backprop import Backprop
from .forward_gradient import ForwardGE
from .plain_loop import PlainLoop

__all__ = ["Backprop", "ForwardGE", "PlainLoop"]
