"""What an estimate will do: per parameter the part of the graph it reaches, how much of it is dense, and the blocks.

A plan is plain data and prints as a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from .capture import Graph
from .fusion import Step, schedule
from .run import has_rule

MEMORY = {"cpu": 48 << 20, "cuda": 2 << 30}
"""Bytes that the differences of one block may take, by device: on a CPU they should stay near the caches."""

MOST = 4096
"""Most perturbations of a block: beyond it nothing is gained, and index tensors grow."""


@dataclass(frozen=True)
class Route:
    """How one parameter's coordinates travel to the loss.

    parameter  name
    shape      of the parameter
    suffix     the nodes that it reaches, in order; empty when it does not reach the loss
    steps      the same nodes as a schedule of fused stretches and single rules
    bytes      differences alive at once for one perturbation, at most
    block      perturbations per block
    """

    parameter: str
    shape: tuple[int, ...]
    suffix: tuple[fx.Node, ...]
    steps: tuple[Step, ...]
    bytes: int
    block: int


def reach(graph: Graph, parameters: Sequence[str]) -> tuple[fx.Node, ...]:
    """Nodes on a path from any of ``parameters`` to the loss, in graph order."""
    forward = {node for node, name in graph.parameters.items() if name in parameters}
    for node in graph.graph.nodes:
        if node.op == "call_function" and any(source in forward for source in node.all_input_nodes):
            forward.add(node)
    backward = {graph.loss}
    for node in reversed(graph.graph.nodes):
        if node in backward:
            backward.update(node.all_input_nodes)
    return tuple(n for n in graph.graph.nodes if n.op == "call_function" and n in forward and n in backward)


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return sum(v.numel() for v in values[:1] if isinstance(v, Tensor)) * 4


def peak_bytes(suffix: Sequence[fx.Node]) -> int:
    """Bytes of dense float32 differences alive at once for one perturbation, with one temporary of each result."""
    last = {source: i for i, node in enumerate(suffix) for source in node.all_input_nodes}
    alive, peak = 0, 0
    held = set(suffix)
    for i, node in enumerate(suffix):
        alive += _size(node)
        peak = max(peak, alive + 2 * _size(node))
        alive -= sum(_size(s) for s in set(node.all_input_nodes) if s in held and last[s] == i)
    return max(peak, 4)


def route(graph: Graph, name: str, parameter: Tensor, block: int | None, memory: int | None) -> Route:
    """The route of one parameter; ``block`` and ``memory`` (bytes) override the defaults."""
    suffix = reach(graph, [name])
    need = peak_bytes(suffix) if suffix else 4
    budget = memory if memory is not None else MEMORY.get(parameter.device.type, MEMORY["cpu"])
    fitting = max(1, min(budget // need, MOST))
    return Route(name, tuple(parameter.shape), suffix, schedule(suffix, graph.loss), need, block or fitting)


@dataclass
class Line:
    """One row of a printed plan."""

    parameter: str
    shape: tuple[int, ...]
    selected: int
    ops: int
    carriers: str
    flop: float
    block: int
    bytes: int
    seconds: float
    fallbacks: tuple[str, ...] = ()


@dataclass
class Plan:
    """The printed form: one line a parameter, in the order of the model.

    queries  perturbed function values of one estimate, the base loss included
    reason   why the model runs whole as a black box, or "" when it was captured
    """

    lines: list[Line]
    queries: int
    base_loss: float
    precision: str
    reason: str = ""
    capture_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Predicted time of one estimate: one coordinate of each parameter was timed within a block."""
        return sum(line.seconds * line.selected for line in self.lines)

    def __str__(self) -> str:
        if self.reason:
            head = f"The model runs whole as a black box, {self.queries:,} full forward passes an estimate:"
            return f"{head}\n  {self.reason}"
        titles = (
            "parameter",
            "shape",
            "coordinates",
            "ops",
            "travels as",
            "MFLOP/query",
            "block",
            "KiB/query",
            "share",
        )
        total = self.seconds or 1.0
        rows = [
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
        widths = [max(len(r[k]) for r in [titles, *rows]) for k in range(len(titles))]
        text = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [titles, *rows]]
        text.insert(1, "  ".join("-" * w for w in widths))
        rate = self.queries / self.seconds if self.seconds else 0.0
        text.append(
            f"{self.queries:,} queries an estimate in {self.precision}, about {self.seconds:.3g} s "
            f"({rate:,.0f} queries/s); the capture took {self.capture_seconds:.2g} s, once"
        )
        slow = sorted({op for line in self.lines for op in line.fallbacks})
        if slow:
            text.append("no rule, evaluated in float64 once per query: " + ", ".join(slow))
        return "\n".join(text)


def missing_rules(suffix: Sequence[fx.Node]) -> tuple[str, ...]:
    return tuple(sorted({str(node.target) for node in suffix if not has_rule(node)}))
