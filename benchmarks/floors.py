"""The least that one query must cost, by the arithmetic and traffic of the products that remain; and what a plan moves.

Counted, not derived: two coordinates of a parameter are estimated and one, on the reference backend, whose products
are all plain PyTorch; the difference is one query. Both counts are linear in the batch, so two samples suffice.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import dzkernels
from deepzero import CGE
from deepzero.carriers import Dense, OneChannel, OneEntry
from deepzero.fusion import PATTERNS, schedule
from deepzero.fusion.convolution import CONVOLUTION_NORM
from deepzero.graph.nodes import UPDATING, aten
from deepzero.plan.route import reach

from .cases import MU, Case, Work, build, objective

SAMPLES = 2


@dataclass(frozen=True)
class Floor:
    """Per query, mean over the mask: FLOPs of convolutions and matrix products, and values they produce."""

    flops: float
    values: float

    def seconds(self, ceilings: dict[str, float], dtype: str) -> tuple[float, float]:
        """(arithmetic, traffic): products at the peak of their dtype; each result written once and read once."""
        size = 2 if dtype == "bfloat16" else 4
        return self.flops / ceilings[f"{dtype}_flops"], 2 * size * self.values / ceilings["memory_bytes"]


class _Count(TorchDispatchMode):
    """FLOPs and results of every product; those of the base pass are in both counts. Some references use float64."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", None)
        if packet in flop_registry and isinstance(out, Tensor) and out.is_floating_point():
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.values += out.numel()
        return out


def count(work: Work) -> Floor:
    case = build(work, batch=SAMPLES)
    estimator = CGE(case.model, objective, mu=MU)
    scale, flops, values = work.batch / SAMPLES, 0.0, 0.0
    with dzkernels.use_backend("reference"):
        for name, chosen in case.mask.items():
            where = chosen.nonzero()
            if len(where):
                one, two = (_products(estimator, case, name, where[:k]) for k in (1, 2))
                # a parameter with one coordinate: its query is what one coordinate costs above none
                if len(where) == 1:
                    two, one = one, _products(estimator, case, name, None)
                share = len(where) / case.count
                flops += share * scale * (two.flops - one.flops)
                values += share * scale * (two.values - one.values)
    with torch.no_grad():
        logits = work.batch * case.model(case.batch[0]).shape[1]  # of a query that needs no product: all it must change
    return Floor(max(flops, 2 * logits), max(values, logits))


def planned(work: Work, *, fused: bool) -> float:
    """Bytes of differences in bfloat16 that the plan of a query reads and writes, mean over the mask.

    Step by step of the plan that fuses convolutions or of the one that does not: what a step reads once each, what a
    norm in training reads a second time where no convolution left its moments, and what the step gives. Views move
    nothing; base values and weights are shared by a block and stay in cache.
    """
    case = build(work, batch=SAMPLES)
    estimator = CGE(case.model, objective, mu=MU, precision="bfloat16")
    engine, total = estimator.engine, 0.0
    with dzkernels.use_backend("reference"), engine.prepared(case.batch) as ready:
        assert ready.base is not None
        for name, chosen in case.mask.items():
            where = chosen.nonzero()[:1]
            if len(where):
                shape, share = tuple(chosen.shape), int(chosen.sum()) / case.count
                patterns = [p for p in PATTERNS if not p.encloses or (fused and p is not CONVOLUTION_NORM)]
                graph = ready.base.graph
                steps = schedule(reach(graph, [name]), graph.loss, patterns)
                moved = _Moved()
                seed = {name: OneEntry(shape, where, torch.full((1,), MU))}
                engine.run(ready.base, steps, seed, 1, moved)
                total += share * moved.bytes
    return work.batch / SAMPLES * total


class _Moved:
    """Adds up what the steps of a block move; called as ``observe(nodes, kernel, carrier)``."""

    def __init__(self) -> None:
        self.bytes = 0
        self._sizes: dict[fx.Node, int] = {}
        self._summed: set[fx.Node] = set()  # convolutions that left the moments of the next norm

    def __call__(self, nodes: Sequence[fx.Node], kernel: str, carrier: Any) -> None:
        out, first = nodes[-1], nodes[0]
        self._sizes[out] = size = carrier.values.nbytes if isinstance(carrier, Dense | OneChannel) else 0
        if first.target in (operator.getitem, aten.clone.default) or getattr(first.target, "is_view", False):
            return
        sources = {n for node in nodes for n in node.all_input_nodes} - set(nodes)
        self.bytes += size + sum(self._sizes.get(n, 0) for n in sources)
        if first.target in UPDATING and first.args[5] and first.args[0] not in self._summed:
            self.bytes += self._sizes.get(first.args[0], 0)  # type: ignore[arg-type]
        if kernel.endswith("+moments"):
            self._summed.add(out)


def _products(estimator: CGE, case: Case, name: str, where: Tensor | None) -> _Count:
    mask = {name: torch.zeros_like(case.mask[name])}
    if where is None:  # nothing but the base pass
        with _Count() as counter, estimator.engine.prepared(case.batch):
            pass
        return counter
    mask[name][tuple(where.unbind(1))] = True
    estimator.estimate(case.batch, mask)  # captures
    with _Count() as counter:
        estimator.estimate(case.batch, mask)
    return counter
