"""C++ kernels: allocate the result and pass tensors and sizes to dzkernels._C."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._load import kernel
from .._norm import RowNorm
from .._op import DECLARED, op_of


def launch(module: str, *args: Tensor | int | float | None) -> None:
    """Call the kernel of csrc/cpu/<op>.cpp with the addresses of tensors (None: null) and numbers, as it says there.
    `module` is the __name__ of the file <op>.py that calls."""
    kernel(op_of(module))(*args)


def direct(op: str) -> Callable[..., Tensor]:
    """A launcher for a kernel whose arguments follow from the declaration: the tensors in that order, contiguous; the
    result; the size of each dimension, in the order in which the tensors first name them; the options."""
    declared = DECLARED[op]
    axes: dict[str, tuple[int, int]] = {}
    for at, arg in enumerate(declared.args):
        for axis, dim in enumerate(arg.dims.split(", ")):
            if dim.isidentifier() and not arg.optional:
                axes.setdefault(dim, (at, axis))
    shape = [list(axes).index(dim) for dim in declared.kernels["cpu"].result.split(", ")]
    launched = kernel(op)

    def start(*tensors: Tensor | None, **options: float) -> Tensor:
        sizes = [tensors[at].shape[axis] for at, axis in axes.values()]  # type: ignore[union-attr]
        out = torch.empty([sizes[at] for at in shape], dtype=torch.float32, device="cpu")
        launched(*[None if t is None else t.contiguous() for t in tensors], out, *sizes, *options.values())
        return out

    return start


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel reads or writes for `dtype`: bfloat16 or float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def is_half(values: Tensor | None) -> bool:
    return values is not None and values.dtype == torch.bfloat16


def row_norm(norm: RowNorm | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, float]:
    """zc, var, gamma and eps as kernels take them; null without a norm."""
    if norm is None:
        return None, None, None, 0.0
    gamma = None if norm.gamma is None else norm.gamma.float().contiguous()
    return norm.zc.contiguous(), norm.var.contiguous(), gamma, norm.eps
