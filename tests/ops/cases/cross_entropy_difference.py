"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import mpmath
import torch
from torch import Tensor

from helpers import UNIT, integers, normal
from ops.calls import F64, Compiled, Timed, empty, indices
from ops.case import Case


def inputs(
    perturbations: int, samples: int, classes: int, scale: float, spread: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = (normal(samples, classes, seed=1, dtype=torch.float64) * spread).log_softmax(1)
    dlogits = normal(perturbations, samples, classes, seed=3) * scale
    return log_probs, integers([samples], classes, seed=2), dlogits


def exact(log_probs: Tensor, target: Tensor, dlogits: Tensor) -> Tensor:
    """In 60 digits. Stored rows sum to 1 only up to rounding: near 1 that error must be left out, as the log1p form
    does; far below 1 it would be magnified, and the plain sum has it not."""
    values = []
    with mpmath.workdps(60):
        for rows in dlogits.tolist():
            total = mpmath.mpf(0)
            for log_p, d, y in zip(log_probs.tolist(), rows, target.tolist(), strict=True):
                moved = sum(mpmath.exp(lp) * mpmath.expm1(mpmath.mpf(v) - d[y]) for lp, v in zip(log_p, d, strict=True))
                plain = sum(mpmath.exp(mpmath.mpf(lp) + v - d[y]) for lp, v in zip(log_p, d, strict=True))
                total += mpmath.log1p(moved) if moved > -0.5 else mpmath.log(plain)
            values.append(float(total / len(target)))
    return torch.tensor(values, dtype=torch.float64)


def cases() -> Iterator[Case]:
    for shape in ((3, 5, 10), (2, 1, 2), (1, 3, 37), (2, 7, 1), (0, 2, 3), (2, 300, 10), (1, 3, 2100), (2, 300, 1000)):
        for scale in (1e-6, 0.1, 30.0, 1e30):
            log_probs, target, dlogits = inputs(*shape, scale)
            e = dlogits.double() - dlogits.double().gather(2, target.expand(shape[0], -1).unsqueeze(2))
            size = (log_probs.exp() * e.abs()).sum(2).mean(1) + (scale >= 0.1) * e.abs().amax(2).mean(1)
            args = {"log_probs": log_probs, "target": target, "dlogits": dlogits}
            yield Case(f"{shape}, scale={scale}", args, 64 * UNIT[torch.float64] * size, large=shape[1:] == (300, 1000))
    log_probs = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    dlogits = torch.tensor([[[0.0, 5.0]], [[math.nan, 0.0]], [[0.0, math.nan]]])
    args = {"log_probs": log_probs, "target": torch.tensor([0]), "dlogits": dlogits}
    yield Case("an impossible class, NaN", args, nan=True)
    log_probs = torch.tensor([[-700.0, 0.0]], dtype=torch.float64)
    dlogits = torch.tensor([[[60.0, 0.0]], [[800.0, 0.0]]])  # the sum of p expm1(e) is almost -1
    args = {"log_probs": log_probs, "target": torch.tensor([0]), "dlogits": dlogits}
    yield Case("a target that had no chance", args, 8 * UNIT[torch.float64] * 800)


def compiled() -> Iterator[Compiled]:
    for count, samples, classes in ((96, 128, 10), (96, 128, 1000), (1, 1, 1)):
        args = empty(samples, classes, dtype=F64), indices(samples), empty(count, samples, classes)
        yield Compiled(f"K {classes}", args, hot=count > 1)


def timed() -> Iterator[Timed]:
    def make(p: int, n: int, k: int) -> Any:
        log_probs = torch.randn(n, k, dtype=torch.float64).log_softmax(1)
        return (log_probs, torch.arange(n) % k, 1e-2 * torch.randn(p, n, k)), {}

    yield Timed("W1 head, P 1024", lambda: make(1024, 128, 10))
    yield Timed("W3 head, P 4096", lambda: make(4096, 64, 10))
