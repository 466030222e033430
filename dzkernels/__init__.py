"""Kernels that propagate finite differences. They know tensors and no modules."""

from ._load import build_info
from ._norm import RowNorm
from .backends import BACKENDS, BackendError, available_backends, use_backend, use_isa
from .memory import keep_freed_memory
from .ops import (
    OPS,
    attention_difference,
    batch_norm_conv2d,
    channel_batch_norm,
    channel_conv2d,
    channel_conv2d_batch_norm,
    channel_linear_cross_entropy,
    conv2d_tap,
    conv2d_tap_batch_norm,
    cross_entropy_difference,
    dense_batch_norm,
    dense_conv2d,
    gelu_difference,
    layer_norm_difference,
    linear_difference,
    mlp_difference,
    self_attention_difference,
    softmax_difference,
)

__all__ = [
    "BACKENDS",
    "OPS",
    "BackendError",
    "RowNorm",
    "attention_difference",
    "available_backends",
    "batch_norm_conv2d",
    "build_info",
    "channel_batch_norm",
    "channel_conv2d",
    "channel_conv2d_batch_norm",
    "channel_linear_cross_entropy",
    "conv2d_tap",
    "conv2d_tap_batch_norm",
    "cross_entropy_difference",
    "dense_batch_norm",
    "dense_conv2d",
    "gelu_difference",
    "keep_freed_memory",
    "layer_norm_difference",
    "linear_difference",
    "mlp_difference",
    "self_attention_difference",
    "softmax_difference",
    "use_backend",
    "use_isa",
]
