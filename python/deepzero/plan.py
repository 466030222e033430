"""What an estimate will do: per parameter the part of the graph it reaches, how much of it is dense, and the blocks.

A plan is plain data and prints as a table.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from .capture import Graph
from .errors import DeviceError
from .fusion import Pattern, Step, schedule
from .run import has_rule

if TYPE_CHECKING:
    from .replay import Device

log = logging.getLogger("deepzero")
aten = torch.ops.aten

MEMORY = 24 << 20
"""Bytes that the differences of one block may take on a CPU: they should stay near the caches."""

FRACTION = 0.5
"""Of the free memory of another device. The rest is for the next base pass, temporaries and what is saved for rules."""

MOST = 1024
"""Most perturbations of a block: enough to hide the cost of a call, few enough to keep small values in cache."""


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
    return sum(v.numel() for v in values[:1] if isinstance(v, Tensor))


_WEIGHTED = (aten.convolution.default, aten.linear.default)
_MIXING = (
    *_WEIGHTED,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.native_layer_norm.default,
    aten.native_group_norm.default,
    aten._softmax.default,
    aten._log_softmax.default,
)


VIEWS = frozenset(
    {
        operator.getitem,
        aten.view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.unbind.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.clone.default,
    }
)
"""Ops whose difference lies in the memory of their input's."""


def _share(node: fx.Node, shares: dict[fx.Node, float], entries: frozenset[fx.Node]) -> float:
    """The part of a node's value that moves when one entry of a parameter does: a channel, until channels mix."""
    moved = [n for n in node.all_input_nodes if n in shares]
    still_input = node.args[0] not in shares
    if node.target in _WEIGHTED and still_input and all(n in entries for n in moved):
        shape = node.meta["val"].shape
        return 1.0 / int(shape[1 if node.target is aten.convolution.default else -1])
    if node.target in _MIXING and not still_input:
        return 1.0
    return max(1.0 / max([*n.meta["val"].shape, 1]) if n in entries else shares[n] for n in moved)


def peak_bytes(steps: Sequence[Step], starts: Sequence[fx.Node], *, dense: bool, width: int = 4) -> int:
    """Bytes of differences alive at once for one perturbation, about: results of steps, and a temporary of each.

    starts  placeholders at which it starts, as one entry each, or ``dense`` as a whole tensor
    width   bytes of one value
    """
    entries = frozenset() if dense else frozenset(starts)
    shares = dict.fromkeys(starts, 1.0 if dense else 0.0)
    held: dict[fx.Node, float] = {}
    owners: dict[fx.Node, fx.Node] = {}  # live value -> the one in whose memory it lies
    alive, peak = 0.0, 0.0
    for step in _as_run(steps, shares):
        for node in step.nodes:
            if any(n in shares for n in node.all_input_nodes):
                shares[node] = _share(node, shares, entries)
        out = step.nodes[-1]
        source = out.args[0] if len(step.nodes) == 1 and out.target in VIEWS else None
        owners[out] = owners.get(source, out) if isinstance(source, fx.Node) else out
        if owners[out] is out:
            held[out] = width * _size(out) * shares.get(out, 0.0)
            alive += held[out]
            peak = max(peak, alive + held[out])
        for node in step.frees:
            owner = owners.pop(node, None)
            if owner is not None and owner not in owners.values():
                alive -= held.pop(owner)
    return max(int(peak), 4)


def _as_run(steps: Sequence[Step], shares: Mapping[fx.Node, float]) -> Iterator[Step]:
    """The steps, with the parts of those whose kernel is narrow and whose first node is reached by a whole value."""
    for step in steps:
        whole = any(shares.get(n, 0.0) >= 1.0 for n in step.nodes[0].all_input_nodes)
        yield from step.parts if step.narrow and whole else (step,)


def budget(device: Device | None) -> int:
    """Bytes that the differences of one block may take; None is a CPU."""
    return MEMORY if device is None else int(FRACTION * device.free())


def route(
    graph: Graph,
    name: str,
    shape: Sequence[int],
    block: int | None,
    width: int,
    device: Device | None,
    *,
    first: Sequence[Pattern] = (),
) -> Route:
    """The route of one parameter; ``block`` overrides the size that memory suggests at ``width`` bytes a value.

    ``first``: patterns as of :func:`deepzero.fusion.schedule`.

    Off the CPU that is a power of two, which does not follow every little change of the free memory.
    """
    suffix = reach(graph, [name])
    steps = schedule(suffix, graph.loss, first=first)
    need = peak_bytes(steps, graph.placeholders(name), dense=False, width=width)
    fits = max(1, min(budget(device) // need, MOST))
    if device is not None:
        fits = 1 << (fits.bit_length() - 1)
    return Route(name, tuple(shape), suffix, steps, need, block or fits)


def in_pieces(count: int, size: int, run: Callable[[int, int], Tensor], what: str) -> tuple[Tensor, int]:
    """``run(start, stop)`` over ``count`` perturbations, at most ``size`` at once and half as many when memory is out.

    Returns the results one after the other and the size that fits; :class:`DeviceError` when not even one does.
    """
    results: list[Tensor] = []
    done, fits, refused = 0, size, ""
    while done < count:
        stop = min(done + fits, count)
        try:
            results.append(run(done, stop))
        except torch.OutOfMemoryError as error:
            refused = (str(error).splitlines() or ["out of memory"])[0]
        else:
            done = stop
            continue
        # not in the except clause: the traceback holds what the attempt had allocated
        if stop - done == 1:
            raise DeviceError(
                f"{what}: the device has no memory for one perturbation ({refused}). Use a smaller batch, "
                "precision='bfloat16', or free what else lies on it."
            )
        fits = (stop - done) // 2
    if fits < size:
        log.warning("%s: no memory for %d perturbations at once (%s); going on with %d", what, size, refused, fits)
    return results[0] if len(results) == 1 else torch.cat(results), fits


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
        text = [*table([titles, *parameters]), ""]
        spent = [(name, f"{100 * seconds / total:.1f} %") for name, seconds in self.kernels.items()]
        text += [*table([("fused kernel or rule", "share"), *spent]), ""]
        rate = self.queries / self.seconds if self.seconds else 0.0
        text.append(
            f"{self.queries:,} queries an estimate in {self.precision}, about {self.seconds:.3g} s "
            f"({rate:,.0f} queries/s); the capture took {self.capture_seconds:.2g} s, once"
        )
        slow = sorted({op for line in self.lines for op in line.fallbacks})
        if slow:
            text.append("no rule, evaluated in float64 once per query: " + ", ".join(slow))
        return "\n".join(text)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as aligned lines, the first row underlined."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return lines


def missing_rules(suffix: Sequence[fx.Node]) -> tuple[str, ...]:
    return tuple(sorted({str(node.target) for node in suffix if not has_rule(node)}))
