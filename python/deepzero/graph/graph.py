"""A captured model + objective, as data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured model + objective. Every field refers to node names or nodes of ``graph``.

    parameters  placeholder -> name of the parameter in ``model.named_parameters()``; tied weights share a name
    buffers     placeholder -> name of the buffer in ``model.named_buffers()``
    constants   placeholder -> tensor that the code closed over
    batch       placeholders of the batch's tensor leaves, in order
    loss        the node of the loss
    """

    graph: fx.Graph
    parameters: dict[fx.Node, str]
    buffers: dict[fx.Node, str]
    constants: dict[fx.Node, Tensor]
    batch: tuple[fx.Node, ...]
    loss: fx.Node

    def placeholders(self, parameter: str) -> list[fx.Node]:
        return [node for node, name in self.parameters.items() if name == parameter]

    def text(self) -> str:
        """The graph as text, equal for two captures of the same computation."""
        return str(self.graph)
