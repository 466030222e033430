"""What the ops of linear layers share: the layer norm before, the sum after, and the dtypes of products."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .._norm import RowNorm
from .._op import BASE, FLOAT64, WIDE, Arg


def around(rows: str) -> tuple[Arg, ...]:
    """The layer norm before and the sum after, of so many rows."""
    return (
        Arg("norm.zc", f"{rows}, K", BASE, optional=True),
        Arg("norm.var", rows, FLOAT64, optional=True),
        Arg("norm.gamma", "K", WIDE, optional=True),
        Arg("residual", f"P, {rows}, M", check.FLOATS, optional=True),
    )


def norm_tensors(op: str, norm: RowNorm | None) -> tuple[Tensor | None, ...]:
    if norm is None:
        return None, None, None
    check.eps(op, norm.eps, "norm.eps")
    for name in ("zc", "var"):
        check.of_type(op, f"norm.{name}", getattr(norm, name))
    return norm.zc, norm.var, norm.gamma


def taken(residual: Tensor | None, delta: Tensor) -> Tensor | None:
    """A residual in a dtype that kernels take."""
    if residual is None or delta.dtype == torch.float64 or residual.dtype in (torch.float32, torch.bfloat16):
        return residual
    return residual.to(torch.float32)


def product_dtypes(
    op: str, delta: Tensor, operands: torch.dtype | None, out_dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtypes of a product's operands and result, that of delta where none is given."""
    return {
        "operands": check.float_dtype(op, "operands", operands, delta.dtype),
        "out_dtype": check.float_dtype(op, "out_dtype", out_dtype, delta.dtype),
    }
