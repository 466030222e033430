"""What every result is compared with: the plain query loop, first-order gradients and forward gradients."""

from ..estimators import Estimator
from .backprop import Backprop
from .forward_gradient import ForwardGE
from .plain_loop import PlainLoop

BASELINES: dict[str, type[Estimator]] = {
    "forward-gradient": ForwardGE,
    "plain-loop": PlainLoop,
    "backprop": Backprop,
}
"""name in a configuration -> what a zeroth-order run is compared with."""

__all__ = ["BASELINES", "Backprop", "ForwardGE", "PlainLoop"]
