"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import integers, small_ints
from ops.calls import BF16, ONES, RESNET, Compiled, Timed, empty, indices, products, spread
from ops.case import Case
from ops.cases.conv2d_tap import geometries

# N, H, W, O, Cg, kernel, stride, padding, dilation, groups
SHAPES = [
    pytest.param((2, 8, 8, 16, 3, (3, 3), (1, 1), (1, 1), (1, 1), 1), id="plain"),
    pytest.param((1, 5, 7, 1, 1, (3, 3), (1, 1), (0, 0), (1, 1), 1), id="one image, one channel"),
    pytest.param((2, 9, 9, 64, 2, (3, 3), (1, 1), (1, 1), (1, 1), 1), id="64 channels, odd rows"),
    pytest.param((2, 6, 5, 37, 2, (3, 3), (1, 1), (1, 1), (1, 1), 1), id="37 channels"),
    pytest.param((2, 11, 10, 38, 2, (3, 2), (3, 2), (1, 0), (1, 1), 2), id="stride 3, groups"),
    pytest.param((3, 9, 8, 6, 1, (3, 3), (2, 1), (2, 3), (2, 3), 6), id="dilation, depthwise"),
    pytest.param((2, 1, 1, 10, 4, (1, 1), (1, 1), (0, 0), (1, 1), 1), id="one pixel"),
    pytest.param((1, 4, 40, 24, 2, (1, 5), (1, 1), (0, 2), (1, 1), 1), id="wide row"),
]


def geometry(shape: tuple[Any, ...]) -> dict[str, Any]:
    _, _, _, _, _, _, stride, padding, dilation, groups = shape
    return {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


def by_dense(delta: Tensor, channel: Tensor, weight: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """conv2d of the dense difference: zero but for one input channel."""
    _, _, _, _, width, _, stride, padding, dilation, groups = shape
    outs = []
    for d, c in zip(delta, channel.tolist(), strict=True):
        dense = d.new_zeros(d.shape[0], width * groups, *d.shape[1:])
        dense[:, c] = d
        outs.append(F.conv2d(dense, weight, None, stride, padding, dilation, groups))
    return torch.stack(outs)


def cases() -> Iterator[Case]:
    for name, count, dtype, (samples, channels, height, width, rows, kernel), geometry in geometries():
        args = {
            "delta": small_ints(count, samples, height, width, seed=2, low=-1, high=1, dtype=dtype),
            "channel": integers([count], channels, seed=3),
            "weight": small_ints(rows, channels // geometry["groups"], *kernel, seed=4, low=-2, high=2, dtype=dtype),
            **geometry,
        }
        for out_dtype in (torch.float32, torch.bfloat16) if count == 2 else (dtype,):
            yield Case(f"{name}, out {out_dtype}", args | {"out_dtype": out_dtype}, None, dtype, "large" in name)


def compiled() -> Iterator[Compiled]:
    for name, (count, samples, channels, height, width), outs, dtype in (
        ("f32", RESNET, 16, torch.float32), ("bf16", RESNET, 16, BF16), ("ones", ONES, 1, torch.float32),
    ):  # fmt: skip
        weight = empty(outs, channels, 3, 3, dtype=dtype)
        args = empty(count, samples, height, width, dtype=dtype), indices(count), weight
        yield Compiled(name, args, {"padding": 1}, name != "ones")


def timed() -> Iterator[Timed]:
    def make(p: int, n: int, c: int, size: int) -> Any:
        delta = torch.randn(p, n, size, size)
        return (delta, spread(p, c), torch.randn(c, c, 3, 3)), {"padding": 1}

    yield Timed("W1 layer 2, P 16", lambda: make(16, 128, 18, 16), products(16, 128, 18, 16))
    yield Timed("W2 stage 1, P 8", lambda: make(8, 32, 16, 32), products(8, 32, 16, 32))
    yield Timed("W2 stage 3, P 64", lambda: make(64, 32, 64, 8), products(64, 32, 64, 8))
