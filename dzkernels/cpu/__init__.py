"""C++ kernels: allocate the result and hand tensors and sizes to dzkernels._C."""

from __future__ import annotations

import torch
from torch import Tensor

from .._load import kernel
from .._norm import RowNorm


def launch(op: str, *args: Tensor | int | float | None) -> None:
    """Call the kernel of csrc/cpu/<op>.cpp with the addresses of tensors (None: null) and numbers, as it says there."""
    kernel(op)(*args)


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel reads or writes in place of `dtype`: bfloat16 or float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def is_half(values: Tensor | None) -> bool:
    return values is not None and values.dtype == torch.bfloat16


def row_norm(norm: RowNorm | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, float]:
    """zc, var, gamma and eps as kernels take them; null where there is no norm."""
    if norm is None:
        return None, None, None, 0.0
    gamma = None if norm.gamma is None else norm.gamma.float().contiguous()
    return norm.zc.contiguous(), norm.var.contiguous(), gamma, norm.eps
