"""Kernels that propagate finite differences. They know tensors and no modules."""

from ._load import build_info
from .backends import BACKENDS, BackendError, available_backends, use_backend, use_isa
from .memory import keep_freed_memory
from .ops import OPS, channel_batch_norm, channel_conv2d, conv2d_tap, cross_entropy_difference, dense_batch_norm

__all__ = [
    "BACKENDS",
    "OPS",
    "BackendError",
    "available_backends",
    "build_info",
    "channel_batch_norm",
    "channel_conv2d",
    "conv2d_tap",
    "cross_entropy_difference",
    "dense_batch_norm",
    "keep_freed_memory",
    "use_backend",
    "use_isa",
]
