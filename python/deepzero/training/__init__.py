"""The training loop, its configuration and its checkpoints."""

from .callbacks import Callback, Checkpoints, Metrics, Progress, TensorBoard
from .config import Config, load_config
from .schedule import warmup_cosine
from .trainer import Trainer

__all__ = [
    "Callback",
    "Checkpoints",
    "Config",
    "Metrics",
    "Progress",
    "TensorBoard",
    "Trainer",
    "load_config",
    "warmup_cosine",
]
