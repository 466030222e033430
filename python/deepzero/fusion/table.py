"""The patterns, in the order in which they are tried at every node: what takes more comes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..carriers import Carrier
from .attention import ATTENTION
from .convolution import CONVOLUTION_MOMENTS, CONVOLUTION_NORM, NORM_CONVOLUTION
from .head import HEAD
from .linear import LINEAR, MLP
from .norm import NORM
from .pattern import Pattern

if TYPE_CHECKING:
    from ..block import Block

PATTERNS: tuple[Pattern, ...] = (
    NORM_CONVOLUTION,
    CONVOLUTION_MOMENTS,
    CONVOLUTION_NORM,
    NORM,
    HEAD,
    ATTENTION,
    MLP,
    LINEAR,
)

LAUNCHES: dict[str, Callable[[Block, Any], Carrier | None]] = {p.name: p.launch for p in PATTERNS}
"""name of a pattern -> what runs its region in a block."""


def patterns_for(device: torch.device, dtype: torch.dtype) -> tuple[Pattern, ...]:
    """The patterns that plans look for, on this device and with differences of this dtype."""
    return tuple(pattern for pattern in PATTERNS if pattern.wanted(device, dtype))
