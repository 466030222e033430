"""One case of an op's kernels, and what the cases of several ops share. An op's own, with how far a kernel may be from
the reference, stand in cases/<op>.py; table.py runs them."""

from __future__ import annotations

import math
import os
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
