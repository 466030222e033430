"""Sparsity over training: from one fraction to another, on the way that one small function gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import MaskError
from .ratios import fraction_left_out


def constant(progress: float) -> float:
    """At the end from the first step on."""
    return 1.0


def linear(progress: float) -> float:
    return progress


def cosine(progress: float) -> float:
    """Half a cosine: slow at both ends."""
    return 0.5 * (1 - math.cos(math.pi * progress))


def cubic(progress: float) -> float:
    """Fast first, while there is much to spare (Zhu and Gupta 2017, equation 1)."""
    return 1 - (1 - progress) ** 3


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cubic": cubic,
}
"""name -> how much of the way is done, 0 to 1 and never falling, at a progress from 0 to 1."""


@dataclass(frozen=True)
class Schedule:
    """Sparsity at every step: ``start`` up to step ``begin``, ``end`` from step ``begin + steps`` on.

    name   a key of ``SCHEDULES``: "constant" (``end`` throughout), "linear", "cosine" or "cubic"
    start  fraction left out at first, in [0, 1); it may be larger or smaller than ``end``
    end    fraction left out at last, in [0, 1)
    steps  how many steps the way takes
    begin  steps before it starts

    Raises MaskError for an unknown name, fractions outside [0, 1), ``steps`` below 1 and ``begin`` below 0.
    """

    name: str
    start: float
    end: float
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise MaskError(f"a sparsity schedule is one of {', '.join(SCHEDULES)}, got {self.name!r}")
        fraction_left_out(self.start, f"the start of the {self.name} sparsity schedule")
        fraction_left_out(self.end, f"the end of the {self.name} sparsity schedule")
        if self.steps < 1 or self.begin < 0:
            raise MaskError(
                f"the {self.name} sparsity schedule takes steps >= 1 after begin >= 0 steps, got steps={self.steps}, "
                f"begin={self.begin}"
            )

    def __call__(self, step: int) -> float:
        """The fraction left out at ``step``, counted from 0."""
        way = SCHEDULES[self.name](min(1.0, max(0, step - self.begin) / self.steps))
        return self.start + way * (self.end - self.start) if way < 1 else self.end

    @property
    def most(self) -> float:
        """The highest sparsity that it reaches."""
        return self.end if self.name == "constant" else max(self.start, self.end)


def sparsity_at(sparsity: float | Schedule, step: int) -> float:
    return sparsity(step) if isinstance(sparsity, Schedule) else sparsity


def most_sparsity(sparsity: float | Schedule) -> float:
    return sparsity.most if isinstance(sparsity, Schedule) else sparsity


def sparsity_state(sparsity: float | Schedule) -> float | dict[str, Any]:
    """``sparsity`` as plain types, for a checkpoint; :func:`sparsity_of` reads it back."""
    return asdict(sparsity) if isinstance(sparsity, Schedule) else sparsity


def sparsity_of(state: float | Mapping[str, Any]) -> float | Schedule:
    return Schedule(**state) if isinstance(state, Mapping) else state
