"""The base pass: one forward through the captured graph in float64, whose values every query shares.

It runs once a step, the queries thousands of times, so it can afford float64. Queries read its values rounded to
float32, in which the sign at a kink and the size of a small value survive.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .blackbox import box_of
from .graph.graph import Graph
from .graph.ops import HALF_TO_FLOAT, LOOKUPS, is_random
from .surroundings import BoxState

aten = torch.ops.aten


def promote(value: Any) -> Any:
    """Floating tensors and dtypes become float64; everything else stays."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


@contextlib.contextmanager
def no_autocast(off: bool = True) -> Iterator[None]:
    """Whatever autocast the caller is in, arithmetic inside is done in the dtypes that it is given."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    with contextlib.ExitStack() as stack:
        for kind in kinds if off else ():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def traced_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype that the model itself gives this value."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _draw(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Run a random op in the model's own dtype, so that it draws the numbers an ordinary forward would draw."""

    def own(n: fx.Node) -> Any:
        value, dtype = values[n], traced_dtype(n)
        return value.to(dtype) if isinstance(value, Tensor) and dtype is not None else value

    args, kwargs = fx.map_arg(node.args, own), fx.map_arg(node.kwargs, own)
    if node.target is aten.native_dropout.default:
        x, p, train = node.args[0], args[1], args[2] if len(args) > 2 else True
        _, keep = aten.native_dropout.default(torch.ones_like(args[0]), p, train)
        exact = values[x]  # type: ignore[index]
        scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
        return (exact * keep * scale if train else exact), keep
    return pytree.tree_map(promote, node.target(*args, **kwargs))  # type: ignore[operator]


def _tables(graph: Graph) -> set[fx.Node]:
    """Placeholders that only lookups read: of those, the base pass promotes the rows that are read and no others."""
    return {
        node
        for node in graph.graph.nodes
        if node.op == "placeholder" and node.users and all(_looks_up(user, node) for user in node.users)
    }


def _looks_up(node: fx.Node, table: fx.Node) -> bool:
    return node.target in LOOKUPS and not node.kwargs and node.args[0] is table and table not in node.args[1:]


def _look_up(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """A lookup in float64, in a table of the model's own dtype."""
    table, index, *options = fx.map_arg(node.args, values.__getitem__)
    if node.target is aten.embedding.default:
        return promote(node.target(table, index, *options))
    rows, index = index.unique(return_inverse=True)
    if len(options) == 7:  # with the padding, a row that does not count
        at = (rows == options[6]).nonzero()
        options[6] = int(at) if len(at) else -1
    total, *others, largest = node.target(promote(table[rows]), index, *options)  # type: ignore[operator]
    return total, *others, rows[largest] if largest.dim() == 2 and len(rows) else largest


def interpret(
    graph: Graph, inputs: Mapping[fx.Node, Any], *, exact: bool, boxes: dict[fx.Node, BoxState] | None = None
) -> dict[fx.Node, Any]:
    """The value of every node. ``exact`` promotes all floating arithmetic to float64; else the model's own dtypes.

    ``boxes`` takes on the state from which every black box was called.
    """
    values: dict[fx.Node, Any] = {}
    tables = _tables(graph) if exact else set()
    with torch.no_grad(), no_autocast(exact):
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                value = inputs.get(node)
                values[node] = pytree.tree_map(promote, value) if exact and node not in tables else value
            elif node.op == "call_function":
                if boxes is not None and node.target is torch.ops.deepzero.blackbox.default:
                    boxes[node] = BoxState(box_of(node.args[0]))
                if exact and is_random(node):
                    values[node] = _draw(node, values)
                    continue
                if tables and node.args and node.args[0] in tables:
                    values[node] = _look_up(node, values)
                    continue
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                if exact and node.target is not operator.getitem:
                    args, kwargs = pytree.tree_map(promote, (args, kwargs))
                    if node.target in HALF_TO_FLOAT:
                        args = (*args[:2], False)  # the input is float64 already
                # a value may lie in memory otherwise than it did in the trace, where a view was possible
                target = torch.reshape if node.target is aten.view.default else node.target
                values[node] = target(*args, **kwargs)
    return values


def settle_sizes(graph: Graph, values: Mapping[fx.Node, Any]) -> None:
    """Sizes that tracing left open, because they follow from values (``x[x > 0]``), become those of this base pass.

    Plans read them to choose blocks and kernels; rules read the values themselves.
    """
    for node in graph.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool):
            node.meta["val"] = values[node]
        elif isinstance(val, Tensor) and any(isinstance(size, torch.SymInt) for size in val.shape):
            node.meta["val"] = torch.empty(values[node].shape, dtype=val.dtype, device="meta")


class Layouts:
    """One base tensor [N, C, H, W] in both layouts: channels-last for dense work, channel planes for one channel."""

    def __init__(self, value: Tensor, dtype: torch.dtype) -> None:
        self._value, self._dtype = value, dtype
        self._made: dict[str, Tensor] = {}

    @property
    def images(self) -> Tensor:
        return self._get("images", lambda v: v.to(self._dtype, memory_format=torch.channels_last))

    @property
    def planes(self) -> Tensor:
        def lay(value: Tensor) -> Tensor:
            first = value.transpose(0, 1).to(self._dtype, memory_format=torch.contiguous_format)
            return first.contiguous().transpose(0, 1)  # where no conversion was one, nothing has been copied yet

        return self._get("planes", lay)

    @property
    def made(self) -> dict[str, Tensor]:
        """The layouts that were asked for, by name."""
        return dict(self._made)

    def take(self, other: Layouts) -> None:
        """Make layouts that are still to come from the value of ``other``."""
        self._value = other._value

    def _get(self, name: str, lay: Callable[[Tensor], Tensor]) -> Tensor:
        if name not in self._made:
            self._made[name] = lay(self._value)
        return self._made[name]


class Base:
    """Values of the base pass, by node, in float64 (:meth:`exact`) and in the query dtype (:meth:`low`)."""

    def __init__(
        self,
        graph: Graph,
        values: dict[fx.Node, Any],
        dtype: torch.dtype,
        boxes: Mapping[fx.Node, BoxState] | None = None,
    ) -> None:
        self.graph = graph
        self.dtype = dtype
        self.boxes = dict(boxes or {})
        self._exact = values
        self._low: dict[fx.Node, Tensor] = {}
        self._planes: dict[fx.Node, Layouts] = {}
        self._saved: dict[tuple[fx.Node, str], Any] = {}

    @property
    def loss(self) -> float:
        return float(self._exact[self.graph.loss])

    def exact(self, arg: Any) -> Any:
        """The stored value of a node, as the base pass left it; anything else is returned as it is."""
        return self._exact[arg] if isinstance(arg, fx.Node) else arg

    def low(self, arg: Any) -> Any:
        """The value of a node in the query dtype, whatever its own dtype; a number is returned as it is."""
        if not isinstance(arg, fx.Node):
            return arg
        if arg not in self._low:
            self._low[arg] = rounded(self._exact[arg], self.dtype)
        return self._low[arg]

    def planes(self, node: fx.Node) -> Tensor:
        """Images [N, C, H, W] in the query dtype, each channel's values of all samples next to each other."""
        if node not in self._planes:
            self._planes[node] = Layouts(self._exact[node], self.dtype)
        return self._planes[node].planes

    def columns(self, node: fx.Node) -> Tensor:
        """A value [..., K] in the query dtype as [K, ...], each feature's values of all samples next to each other."""
        return self.saved(node, "columns", lambda: self._exact[node].movedim(-1, 0).to(self.dtype).contiguous())

    def saved(self, node: fx.Node, name: str, make: Callable[[], Any]) -> Any:
        """A quantity derived from base values, made in float64 once a step and shared by every block."""
        key = (node, name)
        if key not in self._saved:
            self._saved[key] = make()
        return self._saved[key]


def rounded(value: Any, dtype: torch.dtype) -> Any:
    """A tensor in the query dtype; images become channels-last, where convolutions of differences are fastest."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(dtype)
    if value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value.contiguous()
