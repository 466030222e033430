"""Is it right for my model? Sampled coordinates against plain float64 quotients, layer by layer, and a step to use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..estimators.cge import CGE
from ..evaluator import Whole
from ..graph.bound import Bound
from ..objective import Objective
from ..state import random_state_kept
from ..surroundings import Surroundings
from ..text import aligned

BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2, "float64": 1e-7}
"""precision -> largest relative error of a parameter tensor's quotients that counts as exact."""

STEPS = (1e-1, 1e-2, 5e-3, 1e-3, 1e-4, 1e-5, 1e-6)
"""Steps that :func:`check` tries when it suggests a mu."""


@dataclass(frozen=True)
class Row:
    """One parameter tensor: relative error of its sampled quotients, and what an error may be."""

    parameter: str
    shape: tuple[int, ...]
    sampled: int
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class Report:
    """Result of :func:`check`; prints as a table.

    rows        one a parameter tensor
    fallbacks   ops without a rule
    reason      why the model runs whole, or ""
    truncation  step -> relative distance of its quotients from the smallest step's; empty if piecewise constant
    mu          suggested step
    advice      why that step
    double      whether the model could be run in float64 for the comparison
    """

    rows: list[Row]
    mu_checked: float
    precision: str
    fallbacks: tuple[str, ...]
    reason: str
    truncation: dict[float, float]
    mu: float
    advice: str
    double: bool = True

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        head = ("parameter", "shape", "sampled", "relative error", "bound", "")
        cells = [
            (
                r.parameter,
                "x".join(map(str, r.shape)) or "scalar",
                str(r.sampled),
                f"{r.error:.1e}",
                f"{r.bound:.1e}",
                "ok" if r.ok else "WRONG",
            )
            for r in self.rows
        ]
        lines = aligned([head, *cells])
        lines.append(f"quotients at mu = {self.mu_checked:g} in {self.precision} against plain float64 quotients")
        if not self.double:
            lines.append("the model does not run in float64: the comparison is as exact as its own precision")
        if self.reason:
            lines.append(f"the model runs whole as a black box: {self.reason}")
        if self.fallbacks:
            lines.append("no rule, evaluated in float64 once per query: " + ", ".join(self.fallbacks))
        else:
            lines.append("every op has a difference rule")
        if self.truncation:
            steps = ", ".join(f"{mu:g}: {error:.1e}" for mu, error in self.truncation.items())
            lines.append(f"distance from the gradient by step: {steps}")
        lines.append(f"suggested mu = {self.mu:g}: {self.advice}")
        return "\n".join(lines)


def check(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    *,
    mu: float = 5e-3,
    precision: str = "float32",
    samples: int = 8,
    seed: int = 0,
) -> Report:
    """Compare up to ``samples`` random coordinates of every parameter tensor with plain float64 quotients.

    The reference perturbs a float64 copy and runs the whole objective, so it shares nothing with the engine but the
    model. It carries rounding noise of about 4 eps |loss| / mu, which is added to the bound. Pure, like ``estimate``.
    Raises what :meth:`CGE.estimate` raises.
    """
    estimator = CGE(model, objective, mu=mu, precision=precision)
    mask = _sampled(model, samples, seed)
    plan = estimator.plan(batch, mask)
    ours = estimator.estimate(batch, mask)
    surroundings = Surroundings(model, objective)
    with random_state_kept() as start:
        try:
            whole = Whole(Bound(model, objective, batch, surroundings.others), start, surroundings)
            reference = {name: torch.zeros(m.shape, dtype=torch.float64) for name, m in mask.items()}
            for name, m in mask.items():
                for where in m.nonzero():
                    value, step = whole.move(name, where, mu)
                    reference[name][tuple(where.tolist())] = (whole.evaluate({name: value}) - whole.loss) / step
        finally:
            surroundings.restore()
    noise = 4 * torch.finfo(torch.float64 if whole.double else torch.float32).eps * max(1.0, abs(whole.loss)) / mu
    total = math.sqrt(sum(float((q**2).sum()) for q in reference.values()))
    rows = []
    for name, m in mask.items():
        want, got = reference[name][m], ours.grads[name].cpu().double()[m]
        size = float(want.norm())
        # a tensor whose own gradient vanishes (a bias before a norm) is judged against the model's
        scale = size + 1e-2 * total / math.sqrt(len(mask))
        bound = BOUNDS[precision] + noise * math.sqrt(len(want)) / scale if scale else noise
        error = float((got - want).norm()) / scale if scale else float(got.norm())
        rows.append(Row(name, tuple(m.shape), len(want), error, bound))
    fallbacks = tuple(sorted({op for line in plan.lines for op in line.fallbacks}))
    truncation, suggested, advice = _suggest(model, objective, batch, mask)
    return Report(rows, mu, precision, fallbacks, plan.reason, truncation, suggested, advice, whole.double)


def _sampled(model: nn.Module, samples: int, seed: int) -> dict[str, Tensor]:
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    generator = torch.Generator().manual_seed(seed)
    mask = {}
    for name, p in model.named_parameters():
        if p.requires_grad and p.numel():
            flat = torch.zeros(p.numel(), dtype=torch.bool)
            flat[torch.randperm(p.numel(), generator=generator)[:samples]] = True
            mask[name] = flat.reshape(p.shape)
    return mask


def _suggest(
    model: nn.Module, objective: Objective, batch: Any, mask: dict[str, Tensor]
) -> tuple[dict[float, float], float, str]:
    estimator = CGE(model, objective)  # one for all steps: the capture is shared
    vectors = {}
    for step in STEPS:
        estimator.mu = step
        grads = estimator.estimate(batch, mask).grads
        vectors[step] = torch.cat([grads[name].cpu().double()[m] for name, m in mask.items()])
    finest = vectors[STEPS[-1]]
    sizes = [int(m.sum()) for m in mask.values()]
    parts = {step: v.split(sizes) for step, v in vectors.items()}
    blind = [
        name
        for k, name in enumerate(mask)
        if not bool(parts[STEPS[-1]][k].any()) and any(bool(parts[s][k].any()) for s in STEPS)
    ]
    if blind:
        step = max(STEPS, key=lambda s: int((vectors[s] != 0).sum()))
        seen = int((vectors[step] != 0).sum())
        return (
            {},
            step,
            f"the loss is piecewise constant in {len(blind)} of {len(mask)} tensors ({blind[0]}, ...): small steps see "
            f"no change there; this one moves the loss for {seen} of {len(finest)} sampled coordinates",
        )
    truncation = {s: float((v - finest).norm()) / (float(finest.norm()) or 1.0) for s, v in vectors.items()}
    for step in STEPS:
        if truncation[step] <= 1e-2:
            return truncation, step, "the largest step whose truncation error is at most 1 %"
    return truncation, STEPS[-1], "the smallest step tried; truncation is above 1 % at every larger one"
