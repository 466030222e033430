"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dzkernels
from helpers import integers, normal
from ops.after import U, changed, norm_of
from ops.case import Case, drawn_convolutions

# N, H, W, O, C, kernel, stride, padding, dilation
SHAPES = [
    pytest.param((3, 16, 16, 18, 2, (3, 3), (1, 1), (1, 1), (1, 1)), id="rows of a register"),
    pytest.param((5, 8, 8, 18, 2, (3, 3), (1, 1), (1, 1), (1, 1)), id="rows that share a register"),
    pytest.param((2, 5, 7, 3, 1, (3, 3), (1, 1), (0, 1), (1, 1)), id="odd rows"),
    pytest.param((2, 30, 37, 33, 2, (3, 3), (1, 1), (2, 1), (1, 1)), id="several blocks, 33 channels"),
    pytest.param((2, 17, 16, 4, 4, (3, 2), (3, 2), (1, 0), (1, 1)), id="stride 3"),
    pytest.param((3, 9, 8, 16, 2, (3, 3), (2, 1), (2, 3), (2, 3)), id="dilation"),
    pytest.param((9, 3, 2, 2, 3, (1, 1), (1, 1), (0, 0), (1, 1)), id="two columns"),
]


def inputs(shape: tuple[Any, ...], count: int = 4, scale: float = 0.1) -> dict[str, Any]:
    samples, height, width, outs, channels, kernel, stride, padding, dilation = shape
    args = {
        "delta": normal(count, samples, height, width, seed=1) * scale + 0.3 * scale,
        "channel": integers([count], channels, seed=2),
        "weight": normal(outs, channels, *kernel, seed=3) * 0.5,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }
    size = dzkernels.channel_conv2d(**args).shape[3:]
    return args | norm_of(samples, outs, *size)


def by_rerun(args: dict[str, Any], training: bool, relu: bool, pool: int, mean: bool) -> tuple[Tensor, Tensor]:
    names = ("delta", "channel", "weight", "stride", "padding", "dilation")
    wide = {name: v.double() if isinstance(v := args[name], Tensor) and v.is_floating_point() else v for name in names}
    d = dzkernels.channel_conv2d(**wide)
    sizes = dzkernels.channel_conv2d(**{**wide, "delta": wide["delta"].abs(), "weight": wide["weight"].abs()})
    error = args["weight"][0, 0].numel() * U * sizes
    wanted, bound = changed(d, error, args, training=training, relu=relu, pool=pool)
    if mean:
        terms = wanted.shape[3] * wanted.shape[4]
        bound = (bound + (terms + 1) * U * wanted.abs()).mean((3, 4))
        wanted = wanted.mean((3, 4))
    return wanted, bound


def cases() -> Iterator[Case]:
    shapes = [(row.id, row.values[0]) for row in SHAPES]
    for k, (n, channels, height, width, outs, *spacing, _) in enumerate(drawn_convolutions(40, groups=1)):
        shapes.append((f"drawn {k}", (n, height, width, outs, channels, *spacing)))
    for k, (name, shape) in enumerate(shapes):
        args = inputs(shape, count=(4, 1, 3, 0)[k % 4])
        samples, _, *size = args["zc"].shape
        if samples * size[0] * size[1] < 8:  # a variance of next to nothing makes much of a rounding
            continue
        for pool, training in itertools.product(range(1, min(3, *size) + 1), (True, False)):
            relu, mean = pool > 1 or k % 2 > 0, (k + pool) % 3 == 0
            bound = 2 * by_rerun(args, training, relu, pool, mean)[1] if args["delta"].numel() else 0.0
            for out_dtype in (torch.float32, torch.bfloat16):
                options = {"training": training, "relu": relu, "pool": pool, "mean": mean, "out_dtype": out_dtype}
                yield Case(f"{name}, {options}", args | options, bound)
