"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dzkernels
from helpers import normal
from ops.after import changed, norm_of, planes
from ops.case import Case, drawn_convolutions

# N, H, W, O, Cin, kernel, stride, padding, dilation, groups
SHAPES = [
    pytest.param((3, 16, 16, 4, 2, (3, 3), (1, 1), (1, 1), (1, 1), 1), id="rows of a register"),
    pytest.param((5, 8, 8, 3, 2, (3, 3), (1, 1), (1, 1), (1, 1), 1), id="rows that share a register"),
    pytest.param((2, 5, 7, 2, 1, (3, 3), (1, 1), (0, 1), (1, 1), 1), id="odd rows"),
    pytest.param((2, 30, 37, 3, 2, (3, 3), (1, 1), (2, 1), (1, 1), 1), id="several blocks"),
    pytest.param((2, 17, 16, 4, 4, (3, 2), (3, 2), (1, 0), (1, 1), 2), id="stride 3, groups"),
    pytest.param((3, 9, 8, 6, 6, (3, 3), (2, 1), (2, 3), (2, 3), 6), id="dilation, depthwise"),
    pytest.param((9, 3, 2, 2, 3, (1, 1), (1, 1), (0, 0), (1, 1), 1), id="two columns"),
]


def inputs(shape: tuple[Any, ...], count: int = 5, scale: float = 0.1) -> dict[str, Any]:
    samples, height, width, outs, channels, kernel, stride, padding, dilation, groups = shape
    x = planes(normal(samples, channels, height, width, seed=1))
    coord = torch.stack(
        [torch.randint(0, n, (count,), generator=torch.Generator().manual_seed(k + n))
         for k, n in enumerate((outs, channels // groups, *kernel))], 1
    )  # fmt: skip
    taps = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    args = {"x": x, "coord": coord, "step": normal(count, seed=2) * scale} | taps
    size = dzkernels.conv2d_tap(**args, out_channels=outs).shape[2:]
    return args | norm_of(samples, outs, *size)


def by_rerun(args: dict[str, Any], training: bool, relu: bool, pool: int) -> tuple[Tensor, Tensor]:
    names = ("x", "coord", "step", "kernel", "stride", "padding", "dilation", "groups")
    with dzkernels.use_backend("reference"):  # one rounding, which the kernel does too
        d = dzkernels.conv2d_tap(**{name: args[name] for name in names}, out_channels=args["zc"].shape[1]).double()
    channel = args["coord"][:, 0]
    wanted, bounds = [], []
    for one, c in zip(d, channel.tolist(), strict=True):
        norm = args | {name: args[name][c : c + 1] for name in ("var", "gamma", "beta")} | {"zc": args["zc"][:, [c]]}
        values, bound = changed(
            one[None, :, None], torch.zeros(1, *one[:, None].shape), norm, training=training, relu=relu, pool=pool
        )
        wanted.append(values[0, :, 0])
        bounds.append(bound[0, :, 0])
    return torch.stack(wanted), torch.stack(bounds)


def cases() -> Iterator[Case]:
    shapes = [(row.id, row.values[0]) for row in SHAPES]
    for k, (n, channels, height, width, outs, *spacing) in enumerate(drawn_convolutions(40)):
        shapes.append((f"drawn {k}", (n, height, width, outs, channels, *spacing)))
    for k, (name, shape) in enumerate(shapes):
        args = inputs(shape, count=(5, 1, 3, 0)[k % 4])
        samples, _, *size = args["zc"].shape
        if samples * size[0] * size[1] < 8:  # a variance of next to nothing makes much of a rounding
            continue
        for pool, training in itertools.product(range(1, min(3, *size) + 1), (True, False)):
            relu = pool > 1 or k % 2 > 0
            bound = 2 * by_rerun(args, training, relu, pool)[1] if args["step"].numel() else 0.0
            options = {"training": training, "relu": relu, "pool": pool}
            yield Case(f"{name}, {options}", args | options, bound)
