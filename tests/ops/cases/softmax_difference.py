"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from helpers import UNIT, normal
from ops.calls import Compiled, Timed, empty, rows
from ops.case import Case

U = UNIT[torch.float32]


# P, R, K
SHAPES = [(3, 4, 1), (2, 5, 2), (4, 3, 10), (2, 3, 64), (3, 2, 65), (1, 9, 197), (2, 1, 9001)]


def inputs(shape: tuple[int, int, int], scale: float, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    p = (normal(*shape[1:], seed=1, dtype=torch.float64) * spread).softmax(1).float()
    return normal(*shape, seed=2) * scale, p


def bound(delta: Tensor, p: Tensor, log: bool) -> Tensor:
    """24 roundings of what the result is made of. Four in each expm1, at most eight additions and a product, then two
    of the result; exp(m) may be 1/2 and doubles what went before. Past that float64: a rounding of the result, and
    the reference near m = -log 2 may take the other form, which differs by how far the row of p is from a sum of 1."""
    d, probs = delta.double().masked_fill(p == 0, 0.0), p.double()
    m = torch.logsumexp(probs.log() + d, 2, keepdim=True)
    x = torch.where(d > 0, -torch.exp(d - m) * torch.expm1(-d), -torch.exp(-m).clamp_max(1e30) * torch.expm1(d))
    far = (m < -math.log(2)) | (d.amax(2, keepdim=True) > 60)
    total = (probs * x).sum(2, keepdim=True)
    moved = probs * torch.exp(d - m)
    off = (probs.sum(1) - 1).abs()[:, None] + 2 * U
    if log:
        return torch.where(far, off + 2 * U * (delta - m).abs(), 24 * U * (delta.double().abs() + m.abs() + total))
    return torch.where(far, off * moved + 2 * U * (moved - probs).abs(), 24 * U * probs * (x + total))


def cases() -> Iterator[Case]:
    for k, shape in enumerate([(9, 2, 16), *SHAPES, (0, 2, 3), (5, 300, 1000)]):
        for scale, log in ((1e-8, k % 2 == 0), (0.3, k % 2 == 1), (60.0, k % 2 == 0)):
            delta, p = inputs(shape, scale)
            allowed = bound(delta, p, log) + 2.0**-148
            large = shape[1] == 300 or (shape[2] > 100 and scale > 1)
            yield Case(f"{shape}, scale={scale}, log={log}", {"delta": delta, "p": p, "log": log}, allowed, large=large)
    delta, p = inputs((1, 1, 600), 60.0)
    yield Case("far, two blocks", {"delta": delta, "p": p}, bound(delta, p, False) + 2.0**-148)
    p = torch.tensor([[math.exp(-100), 1.0, 0.0]])
    for move in (20.0, 60.0, 120.0):
        delta = torch.tensor([[[move, 0.0, 1e30]], [[0.0, -move, -1e30]]])
        allowed = bound(delta, p, False) + 2.0**-148
        yield Case(f"no chance, and impossible, move={move}", {"delta": delta, "p": p}, allowed)
    delta, p = inputs((2, 3, 20), 1.0)
    delta[1, 2, 7] = math.nan
    allowed = bound(delta, p, False).nan_to_num(0)
    yield Case("NaN", {"delta": delta, "p": p}, allowed, nan=True)


def compiled() -> Iterator[Compiled]:
    for name, count, size, classes in (("K 128", 32, 4096, 128), ("ones", 1, 1, 1)):
        yield Compiled(name, (empty(count, size, classes), empty(size, classes)), hot=name != "ones")
    for size, classes in ((4096, 1000), (512, 50272)):
        yield Compiled(f"K {classes} log", (empty(32, size, classes), empty(size, classes)), {"log": True})


def timed() -> Iterator[Timed]:
    def make(p: int, r: int, k: int) -> Any:
        delta, logits = rows(p, r, k)
        return (delta, logits.softmax(1)), {}

    yield Timed("W4 attention, P 4", lambda: make(4, 16 * 3 * 64, 64))
