"""What the parts of an estimate cost, measured: what ``deepzero plan`` prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from ..errors import MaskError
from ..text import aligned


@dataclass
class Line:
    """One row of a printed plan.

    carriers   the kinds of carrier along the way
    flop       operations of torch's convolutions and products for one query
    seconds    of one query, timed on one block
    kernels    fused kernel or rule -> seconds of one query
    fallbacks  ops without a rule
    """

    parameter: str
    shape: tuple[int, ...]
    selected: int
    ops: int
    carriers: str
    flop: float
    block: int
    bytes: int
    seconds: float
    kernels: dict[str, float]
    fallbacks: tuple[str, ...] = ()


@dataclass
class Plan:
    """What :meth:`CGE.plan` returns; prints as two tables: by parameter, and by kernel.

    queries  perturbed function values of one estimate, the base loss included
    reason   why the model runs whole as a black box, or "" when it was captured
    """

    lines: list[Line]
    queries: int
    precision: str
    reason: str = ""
    capture_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Predicted time of one estimate: a block of each parameter was timed."""
        return sum(line.seconds * line.selected for line in self.lines)

    @property
    def kernels(self) -> dict[str, float]:
        """Fused kernel or rule -> predicted seconds of one estimate, most expensive first."""
        total: Counter[str] = Counter()
        for line in self.lines:
            for name, seconds in line.kernels.items():
                total[name] += seconds * line.selected  # type: ignore[assignment]
        return dict(total.most_common())

    @property
    def costs(self) -> dict[str, float]:
        """Seconds of one query by parameter. Raises MaskError where the model runs whole."""
        if not self.lines:
            raise MaskError(
                f"the plan knows no cost by parameter, because the model runs whole: {self.reason} There every query "
                "costs the same: use UniformRandom or LayerwiseRandom."
            )
        return {line.parameter: line.seconds for line in self.lines}

    def __str__(self) -> str:
        if self.reason:
            head = f"The model runs whole as a black box, {self.queries:,} full forward passes an estimate:"
            return f"{head}\n  {self.reason}"
        total = self.seconds or 1.0
        parameters = [
            (
                line.parameter,
                "x".join(map(str, line.shape)) or "scalar",
                f"{line.selected:,}",
                str(line.ops),
                line.carriers,
                f"{line.flop / 1e6:.3f}",
                str(line.block),
                f"{line.bytes / 1024:,.0f}",
                f"{100 * line.seconds * line.selected / total:.1f} %",
            )
            for line in self.lines
        ]
        titles = ("parameter", "shape", "coordinates", "ops", "travels as", "torch MFLOP", "block", "KiB", "share")
        text = [*aligned([titles, *parameters]), ""]
        spent = [(name, f"{100 * seconds / total:.1f} %") for name, seconds in self.kernels.items()]
        text += [*aligned([("fused kernel or rule", "share"), *spent]), ""]
        rate = self.queries / self.seconds if self.seconds else 0.0
        text.append(
            f"{self.queries:,} queries an estimate in {self.precision}, about {self.seconds:.3g} s "
            f"({rate:,.0f} queries/s); the capture took {self.capture_seconds:.2g} s, once"
        )
        slow = sorted({op for line in self.lines for op in line.fallbacks})
        if slow:
            text.append("no rule, evaluated in float64 once per query: " + ", ".join(slow))
        return "\n".join(text)
