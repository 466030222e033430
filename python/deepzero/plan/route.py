"""Where one parameter's coordinates travel: the part of the graph that they reach, as a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..fusion import Step
from ..graph.graph import Graph
from .memory import peak_bytes
from .probe import Ran


@dataclass(frozen=True)
class Route:
    """How one parameter's coordinates travel to the loss.

    parameter  name
    shape      of the parameter
    suffix     the nodes that it reaches, in order; empty when it does not reach the loss
    steps      the same nodes as a schedule of fused regions and single rules
    ran        what the steps did in the probing block
    block      perturbations per block
    """

    parameter: str
    shape: tuple[int, ...]
    suffix: tuple[fx.Node, ...]
    steps: tuple[Step, ...]
    ran: tuple[Ran, ...]
    block: int

    @property
    def bytes(self) -> int:
        """What one perturbation takes at most."""
        return peak_bytes(self.ran)

    def plain(self) -> dict[str, Any]:
        """The route in strings, numbers, lists and dicts: fit for JSON, equal for two captures of one computation."""
        return {
            "parameter": self.parameter,
            "shape": list(self.shape),
            "steps": [step.plain() for step in self.steps],
            "ran": [step.plain() for step in self.ran],
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
