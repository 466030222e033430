"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from helpers import UNIT, integers, normal
from ops.calls import F64, Compiled, Timed, empty, indices, spread
from ops.case import Case


def inputs(perturbations: int, samples: int, classes: int, features: int, scale: float) -> dict[str, Any]:
    return {
        "delta": normal(perturbations, samples, seed=1) * scale,
        "channel": integers([perturbations], features, seed=2),
        "weight": normal(classes, features, seed=3),
        "log_probs": (normal(samples, classes, seed=4, dtype=torch.float64) * 2).log_softmax(1),
        "target": integers([samples], classes, seed=5),
    }


def cases() -> Iterator[Case]:
    for shape in ((5, 16, 10, 7), (1, 1, 2, 1), (2, 9, 33, 4), (2, 7, 1, 3), (0, 2, 3, 4), (2, 300, 1000, 64)):
        for scale in (1e-6, 0.1, 30.0, 1e30):
            args = inputs(*shape, scale)
            products = args["delta"].double().unsqueeze(2) * args["weight"].double().t()[args["channel"]].unsqueeze(1)
            # the reference subtracts rounded products
            bound = 64 * UNIT[torch.float64] * products.abs().amax(2).mean(1)
            yield Case(f"{shape}, scale={scale}", args, bound, large=shape[1] == 300)


def compiled() -> Iterator[Compiled]:
    for count, samples, classes, width in ((96, 128, 10, 64), (96, 128, 1000, 512), (1, 1, 1, 1)):
        base = empty(classes, width), empty(samples, classes, dtype=F64), indices(samples)
        yield Compiled(f"K {classes}", (empty(count, samples), indices(count), *base), hot=count > 1)


def timed() -> Iterator[Timed]:
    def make(p: int, n: int, c: int, k: int) -> Any:
        log_probs = torch.randn(n, k, dtype=torch.float64).log_softmax(1)
        return (1e-2 * torch.randn(p, n), spread(p, c), torch.randn(k, c), log_probs, torch.arange(n) % k), {}

    yield Timed("W1 head, P 384", lambda: make(384, 128, 18, 10))
