"""What the probing block of a route was seen to do, step by step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Ran:
    """One kernel or rule of the probing block, which has one perturbation.

    what     the fused kernel ("batch_norm+relu"), or the op whose rule ran ("rule aten.tanh.default")
    carrier  of its result's difference: "OneChannel", "Dense", ...; "Zero" where nothing moved
    bytes    that its result takes; 0 where it lies in the memory of another difference
    alive    bytes of all differences that are alive after it, its own included
    """

    what: str
    carrier: str
    bytes: int
    alive: int

    def plain(self) -> dict[str, Any]:
        return asdict(self)
