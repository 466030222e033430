"""One case of an op's kernels, and what the cases of several ops share. An op's own, with how far a kernel may be from
the reference, stand in cases/<op>.py; table.py runs them."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers import UNIT

# Triton's interpreter truncates to bfloat16 where a GPU rounds to nearest: an error of up to a whole last place.
HALF_UNIT = UNIT[torch.bfloat16] * (2 if os.environ.get("TRITON_INTERPRET") == "1" else 1)


# Almost nothing of the spread is left but s' >= sqrt(eps), and of two terms that cancel: 8 roundings of gamma |z| / s'.
VANISHING = 8 * UNIT[torch.float32] / math.sqrt(1e-5)

# dtype of the differences, out_dtype
HALVES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
)


# N, Cin, H, W, O, kernel, stride, padding, dilation, groups
Convolution = tuple[int, int, int, int, int, tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], int]


def drawn_convolutions(count: int, groups: int = 3) -> Iterator[Convolution]:
    """So many small convolutions of any geometry with at most so many groups, always the same ones."""
    draw = random.Random(1).randint

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(low, high), draw(low, high)

    while count > 0:
        size, kernel, padding, dilation = (draw(1, 9), draw(1, 20)), pair(1, 4), pair(0, 3), pair(1, 3)
        parts = draw(1, groups)
        shape = (draw(1, 3), parts * draw(1, 3), *size, parts * draw(1, 40), kernel, pair(1, 3), padding, dilation)
        if all(n + 2 * p > d * (k - 1) for n, k, p, d in zip(size, kernel, padding, dilation, strict=True)):
            count -= 1
            yield (*shape, parts)


@dataclass(frozen=True)
class Case:
    """Keyword arguments of the op on the CPU, and how far a kernel may be from the reference.

    bound   broadcasts over the result; one rounding to the dtype of the result is added, for the reference rounds too;
            None: bit for bit
    dtype   of the differences: a kernel that does not take it must say so
    large   too slow for the interpreter
    refused backends that must say that they do not take this, though they have a kernel
    nan     NaN is wanted wherever the reference has it, and nowhere else
    """

    id: str
    args: dict[str, Any]
    bound: Tensor | float | None = None
    dtype: torch.dtype = torch.float32
    large: bool = False
    nan: bool = False
    refused: tuple[str, ...] = ()
