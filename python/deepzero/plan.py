"""What an estimate will do: per parameter the part of the graph it reaches, how much of it is dense, and the blocks.

A plan is plain data and prints as a table.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .fusion import Pattern, Step, schedule
from .graph.graph import Graph

if TYPE_CHECKING:
    from .device import Device


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
    steps      the same nodes as a schedule of fused regions and single rules
    bytes      differences alive at once for one perturbation, at most
    block      perturbations per block
    """

    parameter: str
    shape: tuple[int, ...]
    suffix: tuple[fx.Node, ...]
    steps: tuple[Step, ...]
    bytes: int
    block: int

    def plain(self) -> dict[str, Any]:
        """The route in strings, numbers, lists and dicts: fit for JSON, equal for two captures of one computation."""
        return {
            "parameter": self.parameter,
            "shape": list(self.shape),
            "steps": [step.plain() for step in self.steps],
            "bytes": self.bytes,
            "block": self.block,
        }


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
    """The steps, or their parts where a kernel for a single channel is reached by a whole value."""
    for step in steps:
        whole = any(shares.get(n, 0.0) >= 1.0 for n in step.nodes[0].all_input_nodes)
        yield from step.parts if step.single_channel and whole else (step,)


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
    patterns: Sequence[Pattern],
) -> Route:
    """The route of one parameter; ``block`` overrides the size that memory suggests at ``width`` bytes a value.

    ``patterns`` are those of :func:`deepzero.fusion.schedule`.

    Off the CPU that is a power of two, which does not follow every little change of the free memory.
    """
    suffix = reach(graph, [name])
    steps = schedule(suffix, graph.loss, patterns)
    need = peak_bytes(steps, graph.placeholders(name), dense=False, width=width)
    fits = max(1, min(budget(device) // need, MOST))
    if device is not None:
        fits = 1 << (fits.bit_length() - 1)
    return Route(name, tuple(shape), suffix, steps, need, block or fits)
