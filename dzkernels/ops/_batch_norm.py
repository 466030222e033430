"""Declarations and checks shared by the ops with a batch norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check as check
from .._op import BASE, FLOAT64, INT64, LEAD, LIKE, WIDE, Arg, Sizes

# A dense difference that enters a batch norm.
DENSE = (
    Arg("delta", "P, N, C, H, W", LEAD, filled="N, C, H and W"),
    Arg("zc", "N, C, H, W", BASE),
    Arg("var", "C", FLOAT64),
    Arg("gamma", "C", WIDE, optional=True),
    Arg("residual", "P, N, C, H, W", check.FLOATS, optional=True),
    Arg("residual", "P, N, H, W", BASE, optional=True),  # with residual_channel
    Arg("residual_channel", "P", INT64, optional=True, below="C", what="channels"),
    Arg("y", "N, C, H, W", BASE, optional=True),
    Arg("moments", "P, 2, C", FLOAT64, optional=True),
)

# A batch norm after a convolution.
AFTER = (
    Arg("zc", "N, O, Ho, Wo", LIKE, filled="N, O, Ho and Wo"),
    Arg("var", "O", FLOAT64),
    Arg("gamma", "O", WIDE, optional=True),
    Arg("beta", "O", WIDE, optional=True),
)


def base_dtype(delta: Tensor) -> torch.dtype:
    return torch.float64 if delta.dtype == torch.float64 else torch.float32


def dense_options(
    op: str, *, eps: float, training: bool, residual: Tensor | None, residual_channel: Tensor | None,
    y: Tensor | None, relu: bool, moments: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """The options of an op on a dense difference, checked, as kernels take them."""
    if residual_channel is not None:
        check.given(op, "residual", residual, "residual_channel")
    if moments is not None and not training:
        raise ValueError(f"dz::{op}: moments must be None with training=False, where no norm reads them")
    return {
        "eps": check.eps(op, eps),
        "training": bool(training),
        "residual": residual,
        "residual_channel": residual_channel,
        "y": check.given(op, "y", y, "relu=True") if relu else None,
        "moments": moments,
    }


def dense_tensors(
    *, residual: Tensor | None, residual_channel: Tensor | None, y: Tensor | None, moments: Tensor | None, **_: Any
) -> tuple[Tensor | None, ...]:
    """The tensors among the options, in the order of DENSE."""
    dense, single_channel = (residual, None) if residual_channel is None else (None, residual)
    return dense, single_channel, residual_channel, y, moments


def norm_after_convolution(
    op: str, sizes: Sizes, var: Tensor, gamma: Tensor | None, beta: Tensor | None, *, eps: float, training: bool,
    relu: bool, pool: int,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:  # fmt: skip
    """(var, weight, bias) in float64 and the options of the norm after a convolution, checked, as kernels take them."""
    if check.pool(op, pool, sizes["Ho"], sizes["Wo"]) > 1 and not relu:
        raise ValueError(f"dz::{op}: relu must be True with pool={pool}, got {relu}")
    weight = torch.ones_like(var) if gamma is None else gamma.double()
    bias = torch.zeros_like(var) if beta is None else beta.double()
    options = {"eps": check.eps(op, eps), "training": bool(training), "relu": bool(relu), "pool": pool}
    return (var, weight, bias), options
