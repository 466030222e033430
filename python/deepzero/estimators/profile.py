"""What the parts of an estimate cost, measured: what ``deepzero plan`` prints."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import dzkernels

from ..carriers import OneEntry, describe
from ..engine import Captured
from ..errors import MaskError
from ..plan.probe import Ran
from ..rules.registry import missing_rules
from ..text import aligned


@dataclass
class Line:
    """One row of a printed plan.

    carriers   the kinds of carrier along the way
    flop       operations of torch's convolutions and products for one query
    seconds    of one query, timed on one block
    kernels    fused kernel or rule -> seconds of one query
    ran        what each step did in the probing block
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
    ran: tuple[Ran, ...] = ()
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

    def steps(self) -> str:
        """For each parameter what runs on the way to the loss, in order, and the bytes of one perturbation."""
        text = []
        for line in self.lines:
            rows = [(r.what, r.carrier, f"{r.bytes:,}", f"{r.alive:,}") for r in line.ran]
            text += [line.parameter, *aligned([("fused kernel or rule", "travels as", "bytes", "alive"), *rows]), ""]
        return "\n".join(text)

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


def profile(evaluator: Captured, selected: dict[str, Tensor], mu: float, signs: Sequence[float]) -> list[Line]:
    """Time one block of each parameter's coordinates (name -> [n, rank])."""
    return [_line(evaluator, name, where, mu, len(signs)) for name, where in selected.items()]


def _line(evaluator: Captured, name: str, where: Tensor, mu: float, queries: int) -> Line:
    from torch.utils.flop_counter import FlopCounterMode

    engine, base = evaluator.engine, evaluator.base
    route = engine.planner.route(base, name)
    part = where[: route.block]
    step = torch.full((len(part),), mu, dtype=engine.dtype, device=part.device)
    seed = {name: OneEntry(route.shape, part, step)}
    counter = FlopCounterMode(display=False)
    # torch counts its own ops only, which are what the reference kernels are made of
    with counter, dzkernels.use_backend("reference"):
        engine.run(base, route.steps, seed, len(part))
    kinds: list[str] = []
    kernels: Counter[str] = Counter()
    began = last = time.perf_counter()

    def observe(nodes: Sequence[fx.Node], kernel: str, carrier: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        kind = describe(carrier)
        if kind != "Zero":
            kinds.append(kind)
            label = kernel or f"rule {getattr(nodes[0].target, '__name__', nodes[0].target)}"
            kernels[f"{label} ({kind})"] += now - last  # type: ignore[assignment]
        last = now

    engine.run(base, route.steps, seed, len(part), observe)
    each = queries / len(part)
    return Line(
        name,
        route.shape,
        len(where),
        len(route.suffix),
        " > ".join(_runs(kinds)) or "does not reach the loss",
        each * counter.get_total_flops(),
        route.block,
        route.bytes,
        each * (last - began),
        {label: each * seconds for label, seconds in kernels.items()},
        route.ran,
        missing_rules(route.suffix),
    )


def _runs(kinds: list[str]) -> list[str]:
    """Consecutive repeats removed."""
    return [k for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k]
