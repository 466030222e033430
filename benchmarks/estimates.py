"""What every estimator finds on the works and on the rules' table, and how long it takes: one process of one checkout.

Run by :mod:`benchmarks.same`, which starts it for a checkout, an older one too: so only public names are used here, and
the works and the rules' table are those of this tree.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import deepzero as dz
import dzkernels
from deepzero.baselines import Backprop, ForwardGE, PlainLoop
from rules.cases import ROWS
from rules.cases import Case as Rule

from .cases import MU, WORKS, Case, build, every, objective
from .same import FIXED

Parts = dict[str, Tensor]
"""What one row holds: "loss", "grad of <parameter>", ..."""

BLOCK = 3

FEW = 4
"""Samples in a batch of the rows that would take too long with the work's own."""

KEEP = {"W1": 96, "W2": 400, "W3": 16, "W4": 500}
"""work -> one in how many coordinates of its mask is estimated"""

ENGINES: dict[str, tuple[type, dict[str, Any]]] = {
    "CGE float32": (dz.CGE, {}),
    "CGE bfloat16": (dz.CGE, {"precision": "bfloat16"}),
    "CGE float64": (dz.CGE, {"precision": "float64"}),
    "CGE central float32": (dz.CGE, {"scheme": "central"}),
    "CGE central bfloat16": (dz.CGE, {"scheme": "central", "precision": "bfloat16"}),
    "RGE gaussian float32": (dz.RGE, {"queries": 6}),
    "RGE gaussian bfloat16": (dz.RGE, {"queries": 6, "precision": "bfloat16"}),
    "RGE central float32": (dz.RGE, {"queries": 6, "scheme": "central"}),
    "RGE sphere float32": (dz.RGE, {"queries": 2, "distribution": "sphere"}),
    "RGE rademacher float32": (dz.RGE, {"queries": 2, "distribution": "rademacher"}),
    "RGE orthogonal float32": (dz.RGE, {"queries": 2, "distribution": "orthogonal"}),
    "HybridGE float32": (dz.HybridGE, {"queries": 2, "coordinates": "*"}),
    "StaleGE float32": (dz.StaleGE, {"decay": 0.5}),
}
"""row -> estimator on the difference engine and its options"""

ON_RULES = ("CGE float32", "CGE bfloat16", "CGE float64", "CGE central float32", "RGE gaussian float32")
IN_BLOCKS = (
    "CGE float32",
    "CGE bfloat16",
    "CGE central float32",
    "RGE gaussian float32",
    "RGE gaussian bfloat16",
    "HybridGE float32",
)
BASELINES: dict[str, tuple[type, dict[str, Any]]] = {
    "PlainLoop": (PlainLoop, {"mu": MU}),
    "PlainLoop central": (PlainLoop, {"mu": MU, "scheme": "central"}),
    "Backprop": (Backprop, {}),
    "ForwardGE": (ForwardGE, {"queries": 2}),
}


# --- rows


def rows() -> Iterator[tuple[str, Callable[[], Parts]]]:
    """(name, what finds its parts), in an order in which later ones change nothing of earlier ones."""
    for name in KEEP:
        yield from work_rows(name)
        yield from few_rows(name)
    yield from score_rows()
    for rule in ROWS:
        yield from rule_rows(rule)


def find(name: str, row: Callable[[], Parts]) -> Parts | str:
    """The row's parts, or what it raised: that is compared as well."""
    torch.manual_seed(zlib.crc32(name.encode()))
    try:
        return {part: value.detach().clone() for part, value in row().items()}
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Subject:
    """Model, batch and mask, and estimators that share one capture, where the checkout lets them."""

    def __init__(self, model: nn.Module, goal: Any, batch: Any, mask: Mapping[str, Tensor]) -> None:
        self.model, self.goal, self.batch, self.mask = model, goal, batch, mask
        self.first: Any = None

    def estimator(self, name: str, **options: Any) -> Any:
        kind, own = ENGINES[name]
        if name.startswith("HybridGE"):  # each second coordinate of the mask by CGE, the others by RGE
            own = own | {"coordinates": thinned(self.mask)}
        made = kind(self.model, self.goal, mu=MU, **own, **options)
        if self.first is None:
            self.first = made
        elif hasattr(made, "engine"):  # tracing takes most of a row's time
            captures = "cache" if hasattr(made.engine, "cache") else "_cache"  # its name in older checkouts
            setattr(made.engine, captures, getattr(self.first.engine, captures))
        return made

    def estimate(self, name: str, **options: Any) -> Parts:
        return parts(self.estimator(name, **options).estimate(self.batch, self.mask))

    def backward(self, name: str) -> Parts:
        """Two steps with different masks, and what they leave: gradients, buffers and random state."""
        model, estimator = self.model, self.estimator(name)
        for parameter in model.parameters():
            parameter.grad = None
        losses = [estimator.backward(self.batch, mask).loss for mask in (self.mask, thinned(self.mask))]
        found = {"loss": torch.tensor(losses, dtype=torch.float64), "random state": torch.get_rng_state()}
        found |= {f"grad of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        return found | {f"buffer {name}": b for name, b in model.named_buffers()}


def parts(estimate: Any) -> Parts:
    found = {"loss": torch.tensor(estimate.loss, dtype=torch.float64), "queries": torch.tensor(estimate.queries)}
    return found | {f"grad of {name}": grad for name, grad in estimate.grads.items()}


def thinned(mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first, third, fifth ... coordinate of every tensor."""
    out = {}
    for name, chosen in mask.items():
        kept = chosen.flatten().nonzero()[::2, 0]
        out[name] = torch.zeros(chosen.numel(), dtype=torch.bool).index_fill_(0, kept, True).view(chosen.shape)
    return out


def subject(case: Case, k: int) -> Subject:
    return Subject(case.model, objective, case.batch, every(case, k))


def work_rows(work: str) -> Iterator[tuple[str, Callable[[], Parts]]]:
    """A work with its own batch."""
    made = subject(build(WORKS[work]), KEEP[work])
    for name in ENGINES:
        yield f"{work}: {name}", lambda name=name: made.estimate(name)
        if name in IN_BLOCKS:
            yield f"{work}: {name}{FIXED}{BLOCK}", lambda name=name: made.estimate(name, block=BLOCK)
    for name in ("StaleGE float32", "RGE gaussian float32"):
        yield f"{work}: {name}, backward", lambda name=name: made.backward(name)


def few_rows(work: str) -> Iterator[tuple[str, Callable[[], Parts]]]:
    """A work with few samples: every way to run the kernels on this CPU, and the baselines."""
    case = build(WORKS[work], batch=FEW)
    made = subject(case, KEEP[work])
    refusals = dzkernels.build_info()["isa_refusals"]
    ways = {"reference": lambda: dzkernels.use_backend("reference")}
    ways |= {level: lambda level=level: dzkernels.use_isa(level) for level in refusals if refusals[level] is None}
    for name in ("CGE float32", "CGE bfloat16", "RGE gaussian float32"):
        for way, using in ways.items():

            def run(name: str = name, using: Callable[[], Any] = using) -> Parts:
                with using():
                    return made.estimate(name)

            yield f"{work} {way}: {name}", run
    for name, (kind, options) in BASELINES.items():
        yield (
            f"{work} baseline: {name}",
            lambda kind=kind, options=options: parts(
                kind(case.model, objective, **options).estimate(case.batch, made.mask)
            ),
        )


def score_rows() -> Iterator[tuple[str, Callable[[], Parts]]]:
    """Every score of a small CNN with batch norm, and of W3."""
    torch.manual_seed(0)
    small = dz.models.paper_cnn(2, width=4).train(), (torch.randn(6, 3, 12, 12), torch.randint(0, 10, (6,)))
    w3 = build(WORKS["W3"], batch=FEW)
    for title, (model, batch) in {"small CNN": small, "W3": (w3.model, w3.batch)}.items():
        for name, score in dz.sparsity.SCORES.items():
            options = dz.sparsity.score_options(name, queries=24, seed=0)

            def run(score: Any = score, model: Any = model, batch: Any = batch, options: Any = options) -> Parts:
                found = score(model, objective, batch, **options)
                return {"queries": torch.tensor(found.queries), **{f"of {n}": v for n, v in found.values.items()}}

            yield f"score {title}: {name}", run


def rule_rows(rule: Rule) -> Iterator[tuple[str, Callable[[], Parts]]]:
    torch.manual_seed(zlib.crc32(rule.id.encode()))
    model = rule.model().train(rule.train)
    batch = rule.batch()
    mask = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            chosen = torch.randperm(p.numel())[:6]
            mask[name] = torch.zeros(p.numel(), dtype=torch.bool).index_fill_(0, chosen, True).view(p.shape)
    made = Subject(model, rule.objective, batch, mask)
    for name in ON_RULES:
        yield f"rule {rule.id}: {name}", lambda name=name: made.estimate(name)
    yield f"rule {rule.id}: CGE float32{FIXED}{BLOCK}", lambda: made.estimate("CGE float32", block=BLOCK)
    yield f"rule {rule.id}: StaleGE float32, backward", lambda: made.backward("StaleGE float32")


def save(path: str, facts: dict[str, str], only: str) -> None:
    """Write {"facts": ..., "rows": {name: parts or what was raised}} for the rows whose names contain ``only``."""
    found = {name: find(name, row) for name, row in rows() if only in name}
    torch.save({"facts": facts, "rows": found}, path)


# --- times

TIMED = {"W1": 24, "W2": 400, "W3": 1, "W4": 1000}
"""work -> one in how many coordinates of its mask an estimate by CGE takes; RGE takes the whole mask"""


def cpu_seconds(function: Callable[[], Any]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


class Timer:
    """Answers the parent: a line "<work>: <row>" in, the CPU seconds of one estimate out; the first one captures."""

    def __init__(self) -> None:
        self._ready: dict[str, tuple[Callable[[], Any], int]] = {}

    def time(self, job: str) -> float:
        if job in self._ready:
            run, repeats = self._ready[job]
            return statistics.fmean(cpu_seconds(run) for _ in range(repeats))
        work, _, name = job.partition(": ")
        case = build(WORKS[work])
        made = subject(case, TIMED[work] if name.startswith("CGE") else 1)
        estimator = made.estimator(name)

        def run() -> None:
            estimator.estimate(made.batch, made.mask)

        first = cpu_seconds(run)
        run()
        self._ready[job] = run, max(1, round(0.3 / max(cpu_seconds(run), 1e-3)))
        return first


def main(request: dict[str, Any], imported: float) -> None:
    """``request`` of the parent; ``imported``: CPU seconds that importing the two packages took."""
    torch.set_num_threads(request["threads"])
    warnings.simplefilter("ignore")
    if request["do"] == "save":
        save(request["path"], request["facts"], request["only"])
        return
    timer = Timer()
    print(json.dumps(imported), flush=True)
    with contextlib.suppress(EOFError):
        for line in sys.stdin:
            print(json.dumps(timer.time(line.strip())), flush=True)
