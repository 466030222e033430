"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mpmath
import torch
from torch import Tensor

from helpers import UNIT, normal
from ops.calls import BF16, Compiled, Timed, empty, rows
from ops.case import HALVES, Case

SLOPE = 1.13  # the largest slope of either form
U = UNIT[torch.float32]


def gelu(x: mpmath.mpf, approximate: str) -> mpmath.mpf:
    if approximate == "none":
        return x * mpmath.ncdf(x)
    return x * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3))) / 2


def exact(delta: Tensor, z: Tensor, approximate: str) -> Tensor:
    """In 60 digits."""
    with mpmath.workdps(60):
        rows = [
            [
                float(gelu(mpmath.mpf(x) + d, approximate) - gelu(mpmath.mpf(x), approximate))
                for d, x in zip(row, z.flatten().tolist(), strict=True)
            ]
            for row in delta.flatten(1).tolist()
        ]
    return torch.tensor(rows, dtype=torch.float64).reshape(delta.shape)


def bound(delta: Tensor) -> Tensor:
    """The first coefficient, the last two steps of Horner's rule and a multiplication round once each, the other
    coefficients less; past the series the bounded rest is off by 2e-8 twice, which |d| > 1/4 makes 2.4 roundings."""
    return 6 * U * SLOPE * delta.double().abs()


SPECIAL = torch.tensor([0.0, -0.7517916, 0.25, -0.25, 1e-20, 5.0, -5.0, 13.9, -14.1, 60.0, -60.0])


def cases() -> Iterator[Case]:
    for approximate in ("none", "tanh"):
        z = torch.cat([SPECIAL, torch.linspace(-16, 16, 501)])
        steps = torch.tensor([1e-30, 1e-8, 0.125, 0.2499, 0.25, 0.2501, 0.5, 2.0, 20.0])
        delta = torch.cat([steps, -steps])[:, None].expand(-1, z.numel())
        args = {"delta": delta, "z": z, "approximate": approximate}
        yield Case(f"a sweep, {approximate}", args, bound(delta))
        delta = normal(3, 40, seed=1)
        delta[1, 9] = math.nan
        args = {"delta": delta, "z": normal(40, seed=2), "approximate": approximate}
        yield Case(f"NaN, {approximate}", args, bound(delta).nan_to_num(0), nan=True)
        shapes = [(1, 1), (5, 4, 97), (17, 260), (0, 3), (2, 0), (40, 70000), *[(2, 133)] * 12]
        for k, shape in enumerate(shapes):
            dtype, out_dtype = HALVES[k % 4]
            delta = (normal(*shape, seed=1) * (3.0, 0.1, 20.0)[k % 3]).to(dtype)
            args = {"delta": delta, "z": 2 * normal(*shape[1:], seed=2), "approximate": approximate}
            args["out_dtype"] = out_dtype
            allowed = bound(delta)
            yield Case(f"{shape}, {k}, {approximate}, {dtype} to {out_dtype}", args, allowed, dtype, shape[0] == 40)


def compiled() -> Iterator[Compiled]:
    yield Compiled("erf bf16", (empty(32, 64, 3072, dtype=BF16), empty(64, 3072)))
    yield Compiled("tanh f32", (empty(32, 64, 3072), empty(64, 3072)), {"approximate": "tanh"})
    yield Compiled("ones", (empty(1, 1), empty(1)), hot=False)


def timed() -> Iterator[Timed]:
    yield Timed("W4, P 4", lambda: (rows(4, 1024, 384), {}))
