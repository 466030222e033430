"""What the tests of the ops of linear layers share: the layer norm before the layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import dzkernels
from helpers import UNIT, normal
from ops.cases import layer_norm_difference

U = UNIT[torch.float32]

# P, R, K, M. Rows of 300 are too long to be held.
ROWS = [(2, 9, 96, 70), (3, 40, 33, 17), (1, 1, 1, 1), (5, 7, 20, 140), (20, 5, 64, 16), (2, 3, 300, 20)]


def every_dtype() -> Iterator[tuple[Any, ...]]:
    """dtype of the differences, out_dtype, operands, dtype of the residual or None, and whether there is a norm."""
    halves = (torch.float32, torch.bfloat16)
    return itertools.product(halves, halves, halves, (None, *halves), (False, True))


def beside(tensor_cores: bool) -> int:
    """Roundings of a float32 sum beside one for each of its terms: see linear_difference."""
    return 16 if tensor_cores else 4


def norm_of(r: int, k: int) -> dzkernels.RowNorm:
    z = normal(r, k, seed=14)
    zc = z - z.mean(1, keepdim=True)
    return dzkernels.RowNorm(zc, zc.double().square().mean(1), normal(k, seed=15), 1e-3)


def double(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, dzkernels.RowNorm):
            return value._replace(zc=value.zc.double(), gamma=wide(value.gamma))
        return value.double() if isinstance(value, Tensor) else value

    return {name: wide(value) for name, value in given.items()}


def moved_rows(delta: Tensor, norm: dzkernels.RowNorm | None) -> tuple[Tensor, Tensor]:
    """The rows that go into the layer, in float64, and how far a float32 layer norm may be off."""
    if norm is None:
        return delta.double(), torch.zeros(())
    args = {"delta": delta, **norm._asdict(), "centre": True}
    rows = dzkernels.layer_norm_difference(**double({**args}))
    return rows, 16 * U * layer_norm_difference.size(args)


def norm_errors(r: int, k: int, rows: str = "R") -> list[tuple[dict[str, Any], type[Exception], str]]:
    """Wrong norms of so many `rows` of K numbers, with the errors they give."""
    norm = norm_of(r, k)
    gamma = normal(k + 1, seed=1)
    return [
        ({"norm": norm._replace(zc=norm.zc.double())}, TypeError, r"norm.zc must be float32, got float64"),
        (
            {"norm": norm._replace(zc=norm.zc[:1])},
            ValueError,
            rf"norm.zc must be of shape \[{rows}, K\] = \[{r}, {k}\], got",
        ),
        ({"norm": norm._replace(zc=norm.zc.to("meta"))}, ValueError, r"norm.zc must be on cpu like delta, got meta"),
        ({"norm": norm._replace(var=norm.var.float())}, TypeError, r"norm.var must be float64, got float32"),
        (
            {"norm": norm._replace(var=norm.var[:1])},
            ValueError,
            rf"norm.var must be of shape \[{rows}\] = \[{r}\], got",
        ),
        ({"norm": norm._replace(var=norm.var.to("meta"))}, ValueError, r"norm.var must be on cpu like delta, got meta"),
        ({"norm": norm._replace(gamma=gamma)}, ValueError, rf"norm.gamma must be of shape \[K\] = \[{k}\], got"),
        (
            {"norm": norm._replace(gamma=gamma[:k].half())},
            TypeError,
            r"norm.gamma must be float32 or float64, got float16",
        ),
        (
            {"norm": norm._replace(gamma=gamma[:k].to("meta"))},
            ValueError,
            r"norm.gamma must be on cpu like delta, got meta",
        ),
        ({"norm": norm._replace(eps=-1.0)}, ValueError, r"norm.eps must be at least 0, got -1.0"),
    ]
