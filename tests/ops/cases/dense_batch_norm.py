"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dzkernels._norm import moments
from helpers import UNIT, integers, normal
from ops.calls import BF16, ONES, RESNET, Compiled, Timed, batch_norm, channels_last, empty, images
from ops.case import HALVES, VANISHING, Case

EPS = 1e-5
TERMS = 70  # of a float32 sum of moments: 64 rows, and the roundings of e and of the products


# P, N, C, H, W
SHAPES = [
    pytest.param((3, 4, 18, 8, 8), id="plain"),
    pytest.param((2, 1, 1, 5, 7), id="one image, one channel"),
    pytest.param((1, 3, 33, 5, 7), id="33 channels"),
    pytest.param((2, 9, 3, 1, 1), id="one pixel"),
    pytest.param((3, 7, 16, 9, 10), id="several blocks"),
]


def last(values: Tensor) -> Tensor:
    """The same values in channels-last memory."""
    return values.movedim(-3, -1).contiguous().movedim(-1, -3)


def largest(values: Tensor, pool: int) -> Tensor:
    """Each element replaced by the maximum of its window; those in no window by themselves."""
    tops = F.max_pool2d(values, pool).repeat_interleave(pool, 2).repeat_interleave(pool, 3)
    out = values.clone()
    out[:, :, : tops.shape[2], : tops.shape[3]] = tops
    return out


def inputs(shape: tuple[int, ...], scale: float = 1.0, pool: int = 1) -> dict[str, Any]:
    _, samples, channels, height, width = shape
    x = normal(samples, channels, height, width, seed=1).double() * 2 + 3
    y = last(normal(samples, channels, height, width, seed=3))
    activation = y.clamp_min(0)
    zc = last((x - x.mean((0, 2, 3), keepdim=True)).float())
    return {
        "delta": last(normal(*shape, seed=4) * scale + 0.3 * scale),
        "zc": zc,
        "var": zc.double().var((0, 2, 3), correction=0),  # of zc as rounded, so that the rerun starts where it does
        "gamma": normal(channels, seed=2),
        "y": y,
        "gap": last(activation - largest(activation, pool)),
        "pool": pool,
        "eps": EPS,
    }


def by_rerun(args: dict[str, Any], relu: bool, training: bool) -> tuple[Tensor, Tensor]:
    """The change by running batch norm twice in float64, and how far float32 may be from it."""
    z, delta = args["zc"].double(), args["delta"].double()
    gamma = args["gamma"].double()[:, None, None]
    unit = UNIT[torch.float32]
    before = (args["var"] + EPS).sqrt()[:, None, None]
    dims = (1, 3, 4)
    if training:
        moved = z + delta
        new = (moved.var(dims, correction=0, keepdim=True) + EPS).sqrt()
        centred = z - z.mean((0, 2, 3), keepdim=True)
        change = gamma * ((moved - moved.mean(dims, keepdim=True)) / new - centred / before)
        spread = (delta - delta.mean(dims, keepdim=True)).abs()
        about = spread + spread.amax(dims, keepdim=True)  # |e| about any value that delta has
        moment = (2 * z.abs() * about + about.square()).mean(dims, keepdim=True)
        second = z.abs() * moment / (before * new * (before + new))
        mean = about.mean(dims, keepdim=True)  # of |e|, whose sum gives the mean of delta
        bound = unit * gamma.abs() * ((8 * spread + TERMS * mean) / new + TERMS * second)
        # dvar moves s' too: d s' / s' = dvar error / (2 s'^2)
        bound = bound + unit * TERMS * gamma.abs() * spread / new * moment / (2 * new.square())
    else:
        change = gamma / before * delta
        bound = 8 * unit * change.abs()
    if "residual_channel" in args:
        change[torch.arange(len(change)), :, args["residual_channel"]] += args["residual"].double()
    elif "residual" in args:
        change = change + args["residual"].double()
    bound = bound + 2 * unit * change.abs()
    if relu:
        y = args["y"].double()
        change = (y + change).clamp_min(0) - y.clamp_min(0)
        bound = bound + unit * y.abs()  # of y + dy where a dead unit comes alive
    if args["pool"] > 1:
        gap = args["gap"].double()
        bound = bound + unit * (gap.abs() + change.abs())
        change = F.max_pool2d((gap + change).flatten(0, 1), args["pool"]).unflatten(0, change.shape[:2])
        bound = F.max_pool2d(bound.flatten(0, 1), args["pool"]).unflatten(0, change.shape[:2])
    return change, bound + 2.0**-45


def with_residual(args: dict[str, Any], kind: str | None) -> dict[str, Any]:
    """The same with a residual: None, "dense", "bfloat16" or "channel"."""
    shape = args["delta"].shape
    if kind == "channel":
        args["residual"] = normal(shape[0], shape[1], *shape[3:], seed=6)
        args["residual_channel"] = integers([shape[0]], shape[2], seed=7)
    elif kind is not None:
        args["residual"] = last(normal(*shape, seed=6)).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    return args


def cases() -> Iterator[Case]:
    shapes = [(3, 4, 18, 8, 8), (2, 1, 1, 5, 7), (1, 3, 33, 5, 7), (2, 9, 3, 1, 1), (0, 2, 2, 6, 5), (2, 7, 16, 9, 10)]
    variants = ((True, True), (False, True), (True, False))
    residuals = (None, "dense", "bfloat16", "channel")
    for shape in [*shapes, (2, 19, 70, 12, 17)]:
        for pool in (1, 2, 3) if min(shape[3:]) > 2 else (1,):
            for k, (relu, training) in enumerate(variants[: 3 // pool]):
                residual = residuals[(k + pool) % 4]
                args = with_residual(inputs(shape, 0.1, pool), residual)
                dtype = torch.bfloat16 if k % 2 else torch.float32
                args["delta"] = args["delta"].to(dtype)
                bound = by_rerun(args, relu, training)[1] if shape[0] else 0.0
                args |= {"relu": relu, "training": training, "out_dtype": torch.bfloat16 if k > 1 else torch.float32}
                if k == 1:
                    args["moments"] = moments(args["delta"], args["zc"])
                name = f"{shape}, pool={pool}, relu={relu}, training={training}, residual={residual}"
                yield Case(name, args, bound, dtype, shape[1] == 19)
    for relu, training, pool, residual, (dtype, out_dtype) in itertools.product(
        (False, True), (False, True), (1, 2), residuals, HALVES
    ):
        args = with_residual(inputs((2, 3, 18, 4, 5), 0.1, pool), residual)
        args["delta"] = args["delta"].to(dtype)
        bound = by_rerun(args, relu, training)[1]
        args |= {"relu": relu, "training": training, "out_dtype": out_dtype}
        name = f"every kind, {pool=}, {relu=}, {training=}, {residual=}, {dtype} to {out_dtype}"
        yield Case(name, args, bound, dtype, large=True)
    args = inputs((2, 4, 6, 8, 8))
    args["delta"] = last((args["zc"] * (2.0**-12 - 1)).expand(2, -1, -1, -1, -1))
    largest = (args["gamma"].double().abs() * args["zc"].double().abs().amax((0, 2, 3)))[:, None, None]
    yield Case("a vanishing variance", args, VANISHING * largest)
    args = args | {"moments": moments(args["delta"], args["zc"])}
    yield Case("a vanishing variance, moments", args, VANISHING * largest)
    args = inputs((2, 2, 18, 4, 4), 1.0, 2) | {"relu": True}
    far = args | {"delta": args["delta"] + 1e5}
    yield Case("a large mean", far, by_rerun(far, True, True)[1])
    args["delta"][1, 0, 3, 1, 1] = math.nan
    yield Case("NaN", args, by_rerun(args, True, True)[1].nan_to_num(0), nan=True)


def compiled() -> Iterator[Compiled]:
    for name, shape, pool, dtype in (
        ("f32", RESNET, 1, torch.float32),
        ("bf16", RESNET, 1, BF16),
        ("pool 2 bf16", RESNET, 2, BF16),
        ("ones", ONES, 1, torch.float32),
    ):
        options = {"residual": channels_last(*shape, dtype=dtype), "out_dtype": dtype, **batch_norm(*shape, pool=pool)}
        yield Compiled(name, (channels_last(*shape, dtype=dtype), empty(*shape[1:])), options, name != "ones")


def timed() -> Iterator[Timed]:
    yield Timed("W2 stage 1, P 4, residual, relu", lambda: work(4, 32, 16, 32))
    yield Timed("W2 stage 3, P 16, residual, relu", lambda: work(16, 32, 64, 8))


def work(p: int, n: int, c: int, size: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments as a residual network gives them, to be timed."""
    one = torch.ones(c, dtype=torch.float64)
    residual, y = 1e-2 * images(p, n, c, size, size), images(n, c, size, size)
    args = 1e-2 * images(p, n, c, size, size), images(n, c, size, size), one, one
    return args, {"residual": residual, "y": y, "relu": True}
