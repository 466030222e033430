"""Calls of an op beside its cases, declared in cases/<op>.py too: `compiled()` gives those that aot_triton.py compiles
for GPUs, `timed()` those that benchmarks/kernels.py times. And the tensors that several ops share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dzkernels

BF16, F64 = torch.bfloat16, torch.float64

# --- compiled: tensors without memory, of which only shapes, strides and dtypes count


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A call whose Triton kernels are compiled; `hot` where its speed matters, which is most calls.

    Those called "ones" have sizes of 1 throughout, which a launch hands over as constants.
    """

    what: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    hot: bool = True


RESNET = (96, 128, 16, 32, 32)  # P, N, C, H, W of the first stage of ResNet-20
STAGE_3 = (96, 128, 64, 8, 8)
ONES = (1, 1, 1, 1, 1)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[P, N, C, H, W] with the channels last in memory."""
    count, samples, channels, height, width = shape
    return empty(count, samples, height, width, channels, dtype=dtype).permute(0, 1, 4, 2, 3)


def batch_norm(*shape: int, pool: int = 1) -> dict[str, Any]:
    """P, N, C, H, W: a batch norm with ReLU, and pooling, after the differences."""
    base = shape[1:]
    args = {"var": empty(shape[2], dtype=F64), "gamma": empty(shape[2]), "relu": True, "y": empty(*base)}
    return args | ({"pool": pool, "gap": empty(*base)} if pool > 1 else {})


def row_norm(size: int, width: int) -> dzkernels.RowNorm:
    return dzkernels.RowNorm(empty(size, width), empty(size, dtype=F64), empty(width), 1e-5)


# --- timed: shapes of the works W1-W4


@dataclasses.dataclass(frozen=True)
class Timed:
    """A call that is timed.

    make   builds positional and keyword arguments
    flops  of products in one call, done plainly; 0 for an op that only moves and combines values
    torch  the same by torch, in the layout where it is fastest
    """

    case: str
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    flops: float = 0.0
    torch: bool = False


def images(*shape: int) -> Tensor:
    """[..., C, H, W] in channels-last memory."""
    *outer, c, h, w = shape
    return torch.randn(*outer, h, w, c).movedim(-1, -3)


def spread(count: int, channels: int) -> Tensor:
    """A channel for each perturbation."""
    return torch.arange(count) % channels


def rows(p: int, r: int, m: int) -> tuple[Tensor, Tensor]:
    """Differences and a base."""
    return 1e-2 * torch.randn(p, r, m), torch.randn(r, m)


def products(p: int, n: int, c: int, size: int) -> float:
    """Of a 3x3 convolution of one channel to c."""
    return 2.0 * 9 * p * n * c * size**2
