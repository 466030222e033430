"""channel_linear_cross_entropy: inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from helpers import UNIT, integers, normal
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
