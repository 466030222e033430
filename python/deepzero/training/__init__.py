"""The training loop, its configuration and its checkpoints."""

from .callbacks import Checkpoints, Metrics, Progress, TensorBoard
from .config import Config, load_config
from .masked import masked_step
from .schedule import warmup_cosine
from .trainer import Callback, Trainer

__all__ = [
    "Callback",
    "Checkpoints",
    "Config",
    "Metrics",
    "Progress",
    "TensorBoard",
    "Trainer",
    "load_config",
    "masked_step",
    "warmup_cosine",
]
