"""Kernels that propagate finite differences. They know tensors and no modules."""

from ._load import build_info
from ._norm import RowNorm
from .backends import BACKENDS, BackendError, available_backends, use_backend, use_isa
from .memory import keep_freed_memory
from .ops import FUNCTIONS, OPS

globals().update(FUNCTIONS)  # type checkers read __init__.pyi, made by python -m dzkernels.ops

__all__ = [
    "BACKENDS",
    "OPS",
    "BackendError",
    "RowNorm",
    "available_backends",
    "build_info",
    "keep_freed_memory",
    "use_backend",
    "use_isa",
    *OPS,
]
