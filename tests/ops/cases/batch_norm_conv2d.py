"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dzkernels._norm import moments
from helpers import UNIT, integers, normal
from ops.calls import (
    BF16,
    F64,
    ONES,
    RESNET,
    STAGE_3,
    Compiled,
    Timed,
    batch_norm,
    channels_last,
    empty,
    images,
    products,
)
from ops.case import HALF_UNIT, Case
from ops.cases import dense_batch_norm
from ops.moments import centred

# P, N, C, H, W; O, kernel; stride, padding, dilation
SHAPES = [
    pytest.param(((2, 3, 8, 6, 7), (16, 3, 3), (1, 1, 1)), id="plain"),
    pytest.param(((2, 1, 1, 5, 7), (1, 3, 3), (1, 0, 1)), id="one image, one channel"),
    pytest.param(((1, 2, 33, 5, 7), (20, 1, 1), (2, 0, 1)), id="1 x 1, stride"),
    pytest.param(((2, 2, 5, 9, 8), (7, 3, 2), ((2, 1), (2, 3), (2, 3))), id="dilation, much padding"),
    pytest.param(((2, 9, 3, 1, 1), (70, 1, 1), (1, 0, 1)), id="one pixel, 70 filters"),
]


Shape = tuple[tuple[int, ...], tuple[int, int, int], tuple[Any, Any, Any]]


def inputs(shape: Shape, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    sizes, (filters, *kernel), spacing = shape
    args = dense_batch_norm.inputs(sizes, scale)
    del args["pool"], args["gap"]
    args["delta"] = args["delta"].to(dtype)
    args["weight"] = normal(filters, sizes[2], *kernel, seed=8).to(dtype)
    return args | dict(zip(("stride", "padding", "dilation"), spacing, strict=True))


def convolved(values: Tensor, args: dict[str, Any], weight: Tensor) -> Tensor:
    out = F.conv2d(values.flatten(0, 1), weight, None, args["stride"], args["padding"], args["dilation"])
    return out.unflatten(0, values.shape[:2])


def by_rerun(
    args: dict[str, Any], relu: bool, training: bool, half: float = UNIT[torch.bfloat16]
) -> tuple[Tensor, Tensor]:
    """In float64, and how far the contract lets the result be from it; `half` is a rounding to bfloat16."""
    change, bound = dense_batch_norm.by_rerun(args | {"pool": 1}, relu, training)
    weight = args["weight"].double()
    unit = half if args["weight"].dtype == torch.bfloat16 else UNIT[torch.float32]
    wanted, size = convolved(change, args, weight), convolved(change.abs() + bound, args, weight.abs())
    roundings = UNIT[torch.float32] * (weight[0].numel() + 48) + unit  # of the sum and of a
    return wanted, convolved(bound, args, weight.abs()) + roundings * size + unit * wanted.abs()


LARGE_CONVOLUTION = ((3, 17, 70, 9, 8), (130, 3, 3), (1, 1, 1))


def cases() -> Iterator[Case]:
    shapes = [(row.id, row.values[0]) for row in SHAPES]
    for name, shape in [*shapes, ("P=0", ((0, 2, 3, 5, 6), *shapes[0][1][1:])), ("large", LARGE_CONVOLUTION)]:
        for k, residual in enumerate((None, "dense", "channel")):
            dtype, relu, training = (torch.float32, torch.bfloat16)[k % 2], k != 1, k != 2
            args, sizes = inputs(shape, 0.1, dtype), shape[0]
            if residual == "channel":
                args["residual"] = normal(sizes[0], sizes[1], *sizes[3:], seed=6)
                args["residual_channel"] = integers([sizes[0]], sizes[2], seed=7)
            elif residual is not None:
                args["residual"] = normal(*sizes, seed=6).to(dtype)
            bound = 2 * by_rerun(args, relu, training, HALF_UNIT)[1] if sizes[0] else 0.0
            args |= {"relu": relu, "training": training}
            if residual is not None:
                wanted = convolved(args["delta"].float(), args, args["weight"].float())
                args["next_zc"] = centred(*wanted.shape[1:])
            if training and residual is not None:
                args["moments"] = moments(args["delta"], args["zc"])
            yield Case(f"{name}, residual={residual}", args, bound, dtype, name == "large")


def compiled() -> Iterator[Compiled]:
    after = {"next_zc": empty(*STAGE_3[1:]), "moments": empty(STAGE_3[0], 2, STAGE_3[2], dtype=F64)}
    first = {"next_zc": empty(*RESNET[1:]), "moments": empty(RESNET[0], 2, RESNET[2], dtype=F64)}
    for name, shape, dtype, more in (
        ("C 64 bf16", STAGE_3, BF16, after),
        ("C 64 f32", STAGE_3, torch.float32, after),
        ("C 16 bf16", RESNET, BF16, first),
        ("C 16 bf16 alone", RESNET, BF16, {}),
        ("C 64 residual bf16", STAGE_3, BF16, {"residual": channels_last(*STAGE_3, dtype=BF16)}),
        ("ones", ONES, torch.float32, {"next_zc": empty(1, 1, 1, 1)}),
    ):
        options = {"weight": empty(shape[2], shape[2], 3, 3, dtype=dtype), "padding": 1, **batch_norm(*shape), **more}
        yield Compiled(name, (channels_last(*shape, dtype=dtype), empty(*shape[1:])), options, name != "ones")


def timed() -> Iterator[Timed]:
    def make(p: int, n: int, c: int, size: int) -> Any:
        args, options = dense_batch_norm.work(p, n, c, size)
        return (*args[:3], images(c, c, 3, 3), args[3]), options | {"padding": 1}

    yield Timed("W2 stage 3, P 16", lambda: make(16, 32, 64, 8), 64 * products(16, 32, 64, 8))
