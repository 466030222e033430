"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import UNIT, normal
from ops.calls import BF16, F64, Compiled, Timed, empty, rows
from ops.case import HALVES, Case

EPS = 1e-5


# P, R, M
SHAPES = [(3, 5, 1), (4, 2, 3), (6, 4, 96), (2, 9, 97), (1, 1, 128), (2, 3, 1000), (2, 1, 9001)]


def inputs(shape: tuple[int, int, int], scale: float, centre: bool = True) -> dict[str, Any]:
    x = normal(*shape[1:], seed=1, dtype=torch.float64) * 2 + (3 if centre else 0.3)
    zc = x - x.mean(1, keepdim=True) if centre else x
    return {
        "delta": normal(*shape, seed=4) * scale + 0.3 * scale,
        "zc": zc.float(),
        "var": zc.square().mean(1),
        "gamma": normal(shape[2], seed=2),
        "eps": EPS,
        "centre": centre,
    }


def size(args: dict[str, Any]) -> Tensor:
    """|gamma| ((|d| + |mean|) / s' + |zc| m / (s s' (s + s'))), m = mean(2 |zc d| + d^2): the terms of the result."""
    d, z = args["delta"].double(), args["zc"].double()
    mean = d.mean(2, keepdim=True) if args["centre"] else torch.zeros(())
    s = (args["var"] + args["eps"]).sqrt()[:, None]
    t = ((z + (d - mean)).square().mean(2, keepdim=True) + args["eps"]).sqrt()
    m = (2 * (z * (d - mean)).abs() + (d - mean).square()).mean(2, keepdim=True)
    terms = (d.abs() + mean.abs()) / t + z.abs() * m / (s * t * (s + t))
    return terms if args["gamma"] is None else args["gamma"].double().abs() * terms


def norm(x: Tensor, args: dict[str, Any]) -> Tensor:
    if args["centre"]:
        return F.layer_norm(x, x.shape[-1:], args["gamma"].double(), None, EPS)
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * args["gamma"].double()


def cases() -> Iterator[Case]:
    for k, shape in enumerate([(17, 2, 16), *SHAPES, (0, 2, 3), (3, 300, 768)]):
        for scale, centre in ((1e-8, True), (1.0, False), (0.3, True)):
            args = inputs(shape, scale, centre)
            dtype, out_dtype = HALVES[(k + centre) % 4]
            args |= {"delta": args["delta"].to(dtype), "out_dtype": out_dtype}
            if k % 3 == 0:
                args["gamma"] = None
            bound = 16 * UNIT[torch.float32] * size(args)
            name = f"{shape}, scale={scale}, centre={centre}, {dtype} to {out_dtype}"
            yield Case(name, args, bound, dtype, shape[1] == 300)
    args = inputs((2, 4, 96), 1.0)
    args["delta"] = (args["zc"] * (2.0**-12 - 1)).expand(2, -1, -1).contiguous()
    bound = (16 + 4 * 2.0**12) * UNIT[torch.float32] * size(args)
    yield Case("a vanishing variance", args, bound)
    args = inputs((3, 3, 20), 1.0)
    args["delta"][1, 2, 7] = math.nan
    bound = (16 * UNIT[torch.float32] * size(args)).nan_to_num(0)
    yield Case("NaN", args, bound, nan=True)


def compiled() -> Iterator[Compiled]:
    for name, count, size, width, dtype in (
        ("M 768 bf16", 32, 4096, 768, BF16),
        ("M 768 f32", 32, 4096, 768, torch.float32),
        ("M 128 f32", 32, 4096, 128, torch.float32),
        ("M 50000 f32", 32, 64, 50000, torch.float32),
        ("ones", 1, 1, 1, torch.float32),
    ):
        args = empty(count, size, width, dtype=dtype), empty(size, width), empty(size, dtype=F64), empty(width)
        yield Compiled(name, args, {"eps": 1e-5, "centre": width < 50000}, name != "ones")


def timed() -> Iterator[Timed]:
    def make(p: int, r: int, m: int) -> Any:
        return (*rows(p, r, m), torch.ones(r, dtype=torch.float64), torch.ones(m)), {"eps": 1e-5}

    yield Timed("W4, P 16", lambda: make(16, 1024, 96))
