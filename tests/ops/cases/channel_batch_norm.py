"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import UNIT, integers, normal
from ops.calls import F64, ONES, RESNET, Compiled, Timed, batch_norm, empty, indices, spread
from ops.case import VANISHING, Case

EPS = 1e-5
TERMS = 70  # of a float32 sum of moments: 64, and the roundings of e and of the products


# P, N, C, H, W
SHAPES = [
    pytest.param((6, 4, 3, 8, 8), id="plain"),
    pytest.param((2, 1, 1, 5, 7), id="one image, one channel"),
    pytest.param((3, 9, 4, 1, 1), id="one pixel"),
    pytest.param((9, 7, 5, 3, 11), id="odd"),
    pytest.param((2, 9, 2, 24, 24), id="several blocks"),
]


def largest(values: Tensor, pool: int) -> Tensor:
    """Each element replaced by the maximum of its window; those in no window by themselves."""
    tops = F.max_pool2d(values, pool).repeat_interleave(pool, 2).repeat_interleave(pool, 3)
    out = values.clone()
    out[:, :, : tops.shape[2], : tops.shape[3]] = tops
    return out


def inputs(shape: tuple[int, ...], scale: float = 1.0, pool: int = 1) -> dict[str, Any]:
    perturbations, samples, channels, height, width = shape
    x = normal(samples, channels, height, width, seed=1) * 2 + 3
    wide = x.double()
    mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
    gamma, beta = normal(channels, seed=2), normal(channels, seed=3)
    y = F.batch_norm(wide, mean, var, gamma.double(), beta.double(), False, 0.0, EPS).float()
    return {
        "delta": normal(perturbations, samples, height, width, seed=4) * scale + 0.3 * scale,
        "channel": integers([perturbations], channels, seed=5),
        "x": x,
        "mean": mean,
        "var": var,
        "gamma": gamma,
        "y": y,
        "gap": y.clamp_min(0) - largest(y.clamp_min(0), pool),
        "pool": pool,
        "eps": EPS,
    }


def by_rerun(args: dict[str, Any], relu: bool, training: bool = True) -> tuple[Tensor, Tensor]:
    """The change by running batch norm twice in float64, and how far float32 may be from it."""
    channel, unit = args["channel"], UNIT[torch.float32]
    z = args["x"].double().transpose(0, 1)[channel] - args["mean"][channel][:, None, None, None]  # [P, N, H, W]
    gamma, delta = args["gamma"].double()[channel][:, None, None, None], args["delta"].double()
    before = (args["var"][channel] + EPS).sqrt()[:, None, None, None]
    dims = (1, 2, 3)
    if training:
        moved = z + delta
        new = (moved.var(dims, correction=0, keepdim=True) + EPS).sqrt()
        change = gamma * ((moved - moved.mean(dims, keepdim=True)) / new - z / before)
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
    if relu:
        y = args["y"].double().transpose(0, 1)[channel]
        bound = bound + unit * change.abs()
        change = (y + change).clamp_min(0) - y.clamp_min(0)
        bound = bound + unit * y.abs()  # of y + dy where a dead unit comes alive
    if args["pool"] > 1:
        gap = args["gap"].double().transpose(0, 1)[channel]
        bound = F.max_pool2d(bound + unit * (gap.abs() + change.abs()), args["pool"])
        change = F.max_pool2d(gap + change, args["pool"])
    return change, bound + 2.0**-45


def cases() -> Iterator[Case]:
    shapes = [(2, 4, 3, 8, 8), (2, 1, 1, 5, 7), (3, 9, 4, 1, 1), (0, 2, 2, 6, 5), (1, 15, 2, 24, 24)]
    for shape in [*shapes, (5, 37, 6, 32, 33)]:
        for pool in (1, 2, 3) if min(shape[3:]) > 2 else (1,):
            for relu, training in ((True, True), (False, True), (True, False))[: 1 if pool == 3 else 3]:
                args = inputs(shape, 0.1, pool)
                bound = by_rerun(args, relu, training)[1] if shape[0] else 0.0
                name = f"{shape}, pool={pool}, relu={relu}, training={training}"
                yield Case(name, args | {"relu": relu, "training": training}, bound, large=shape[1] == 37)
    args = inputs((2, 4, 2, 8, 8))
    z = args["x"].transpose(0, 1)[args["channel"]]
    args["delta"] = z * (2.0**-12 - 1)
    largest = (args["gamma"].double()[args["channel"]].abs() * z.double().abs().amax((1, 2, 3)))[:, None, None, None]
    yield Case("a vanishing variance", args, VANISHING * largest)
    args = inputs((2, 4, 2, 8, 8), 1.0, 2) | {"relu": True}
    planes = {name: args[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("x", "y", "gap")}
    yield Case("planes", args | planes, by_rerun(args, True)[1])
    far = args | {"delta": args["delta"] + 1e5}
    yield Case("a large mean", far, by_rerun(far, True)[1])
    args["delta"][1, 0, 0, 0] = math.nan
    yield Case("NaN", args, by_rerun(args, True)[1].nan_to_num(0), nan=True)


def compiled() -> Iterator[Compiled]:
    for name, shape, pool in (("", RESNET, 1), ("pool 2", RESNET, 2), ("ones", ONES, 1)):
        args = empty(*shape[:2], *shape[3:]), indices(shape[0]), empty(*shape[1:])
        yield Compiled(
            name, args, {"mean": empty(shape[2], dtype=F64), **batch_norm(*shape, pool=pool)}, name != "ones"
        )


def timed() -> Iterator[Timed]:
    def make(p: int, n: int, c: int, size: int) -> Any:
        x, y = torch.randn(n, c, size, size), torch.randn(n, c, size, size)
        zero, one = torch.zeros(c, dtype=torch.float64), torch.ones(c, dtype=torch.float64)
        delta = 1e-2 * torch.randn(p, n, size, size)
        return (delta, spread(p, c), x, zero, one, one), {"y": y, "relu": True}

    yield Timed("W1 first layer, P 16, relu", lambda: make(16, 128, 18, 32))
    yield Timed("W2 stage 2, P 32, relu", lambda: make(32, 32, 32, 16))
