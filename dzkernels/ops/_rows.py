"""Declarations and checks shared by the ops of linear layers: the layer norm before, the residual after, the dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .._norm import RowNorm
from .._op import BASE, FLOAT64, WIDE, Arg


def norm_and_residual(rows: str) -> tuple[Arg, ...]:
    """The layer norm before a layer [P, rows, K] -> [P, rows, M], and the residual added after it."""
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


def kernel_residual(residual: Tensor | None, delta: Tensor) -> Tensor | None:
    """The residual in a dtype that kernels take."""
    if residual is None or delta.dtype == torch.float64 or residual.dtype in (torch.float32, torch.bfloat16):
        return residual
    return residual.to(torch.float32)


def product_dtypes(
    op: str, delta: Tensor, operands: torch.dtype | None, out_dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtypes of a product's operands and result; those not given are the dtype of delta."""
    return {
        "operands": check.float_dtype(op, "operands", operands, delta.dtype),
        "out_dtype": check.float_dtype(op, "out_dtype", out_dtype, delta.dtype),
    }
