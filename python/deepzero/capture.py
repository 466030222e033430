"""Model + objective -> a graph of Core ATen ops whose inputs are the parameters, the buffers and the batch.

The capture is ``torch.export`` in the modes the modules are in, decomposed to Core ATen. Dropout stays one op (its
mask is drawn by the base pass), linear layers, cross-entropy and attention without dropout stay one op each, other
attention and recurrent layers appear in their plain forms.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from .blackbox import BlackBox
from .errors import CaptureError
from .estimators.base import Objective

log = logging.getLogger("deepzero")
aten = torch.ops.aten


class Bound(nn.Module):
    """``objective(model, batch)`` as a module of the batch's tensor leaves, so that it can be exported and swapped."""

    def __init__(self, model: nn.Module, objective: Objective, batch: Any) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._hidden = (objective,)  # in a tuple: an objective that is itself a module must not become a child
        self._leaves, self._spec = pytree.tree_flatten(batch)
        self._where = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]

    @property
    def objective(self) -> Objective:
        return self._hidden[0]

    @property
    def tensors(self) -> list[Tensor]:
        return [self._leaves[i] for i in self._where]

    def forward(self, *tensors: Tensor) -> Tensor:
        leaves = list(self._leaves)
        for i, tensor in zip(self._where, tensors, strict=True):
            leaves[i] = tensor
        return self.objective(self.model, pytree.tree_unflatten(leaves, self._spec))


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


@contextlib.contextmanager
def _plain_forms() -> Iterator[None]:
    """No fused attention, transformer fast path or library RNN while tracing: their plain forms have rules."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),
            torch.backends.cudnn.flags(enabled=False),
            torch.enable_grad(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


_ATTENTION = aten.scaled_dot_product_attention.default
_WHOLE = {aten.linear.default, aten.cross_entropy_loss.default, _ATTENTION}
"""Ops that are not Core ATen and stay one node: their rules are better than those of their parts."""


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """To Core ATen but for the ops above; attention that draws a dropout mask or groups heads comes in its parts."""
    for whole in (_WHOLE, _WHOLE - {_ATTENTION}):
        table = torch.export.default_decompositions()
        for op in whole:
            table.pop(op, None)
        result = program.run_decompositions(table)
        if not any(_needs_parts(node) for node in result.graph.nodes):
            break
    return result


def _needs_parts(node: fx.Node) -> bool:
    if node.target is not _ATTENTION:
        return False
    dropout = bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    leading = {tuple(n.meta["val"].shape[:-2]) for n in node.args[:3] if isinstance(n, fx.Node)}
    return dropout or bool(node.kwargs.get("enable_gqa")) or len(leading) > 1


@contextlib.contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Tracing may leave stand-in tensors in plain attributes (nn.LSTM keeps a list of its weights): put them back."""
    saved = []
    for module in model.modules():
        plain = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        lists = {k: list(v) for k, v in plain.items() if isinstance(v, list)}
        saved.append((module, plain, lists, dict(module._buffers)))
    try:
        yield
    finally:
        for module, plain, lists, buffers in saved:
            module._buffers.clear()
            module._buffers.update(buffers)
            for key in [k for k in vars(module) if k not in plain and k not in ("_parameters", "_buffers", "_modules")]:
                del vars(module)[key]
            vars(module).update(plain)
            for key, items in lists.items():
                vars(module)[key][:] = items


def capture(bound: Bound) -> Graph:
    """Trace ``bound``. Raises :class:`CaptureError` with the reason when it cannot be traced."""
    model = bound.model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # export comments on its own internals
            with _plain_forms(), _attributes_restored(model):
                program = torch.export.export(bound, tuple(bound.tensors), strict=False)
                program = _decomposed(program)
    except Exception as error:  # whatever stops the tracer is the reason we report
        reason = str(error).strip().splitlines()
        raise CaptureError(f"{type(error).__name__}: {reason[0] if reason else 'no message'}") from error

    for node in program.graph.nodes:
        if any(isinstance(v, Tensor) and v.is_complex() for v in pytree.tree_leaves(node.meta.get("val"))):
            raise CaptureError("the graph holds complex values, whose differences have no rules")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    buffers_by_id = {id(buffer): name for name, buffer in model.named_buffers()}
    nodes = {node.name: node for node in program.graph.nodes}
    parameters, buffers, constants, batch = {}, {}, {}, []
    for spec in program.graph_signature.input_specs:
        node = nodes.get(spec.arg.name)
        if node is None:
            continue
        if spec.kind is InputKind.PARAMETER:
            parameters[node] = names[id(bound.get_parameter(str(spec.target)))]
        elif spec.kind is InputKind.BUFFER:
            buffers[node] = buffers_by_id[id(bound.get_buffer(str(spec.target)))]
        elif spec.kind is InputKind.USER_INPUT:
            batch.append(node)
        else:
            constant = program.constants[str(spec.target)]
            if id(constant) in names:
                parameters[node] = names[id(constant)]
            else:
                constants[node] = constant
    losses = [s.arg.name for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    if len(losses) != 1 or losses[0] not in nodes:
        raise CaptureError("the objective does not return a value that is computed from the model")
    return Graph(program.graph, parameters, buffers, constants, tuple(batch), nodes[losses[0]])


# What a captured graph silently depends on: everything Python-valued that tracing has burnt in.

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def _plain_value(value: Any, depth: int = 0) -> Any:
    """A hashable description of ``value``, or NotImplemented for what is not followed."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        version = 0 if value.is_inference() else value._version
        return (id(value), version, tuple(value.shape), value.dtype)
    if isinstance(value, tuple | list) and len(value) <= 64 and depth < 4:
        items = (_plain_value(item, depth + 1) for item in value)
        return (type(value).__name__, len(value), *(item for item in items if item is not NotImplemented))
    if isinstance(value, dict) and len(value) <= 64:
        return _plain_value([item for pair in value.items() for item in pair], depth)
    if isinstance(value, SimpleNamespace | argparse.Namespace) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    ):
        return _plain_value(vars(value), depth)
    if isinstance(value, BlackBox):
        return ("black box", value.handle)
    return NotImplemented


def _names_used(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, CodeType):
            names |= _names_used(const)
    return names


def _walk_function(function: Any, path: str, found: dict[str, Any], depth: int = 0) -> None:
    if isinstance(function, functools.partial):
        found[f"{path} arguments"] = _plain_value([*function.args, function.keywords])
        function = function.func
    if isinstance(function, MethodType):
        found[f"{path} self"] = _plain_value(getattr(function.__self__, "__dict__", None))
        function = function.__func__
    if not isinstance(function, FunctionType) or depth > 3:
        return
    values = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    named: dict[str, Any] = {}
    for name, cell in values.items():
        with contextlib.suppress(ValueError):  # an empty cell
            named[name] = cell.cell_contents
    for name in _names_used(function.__code__):
        if name in function.__globals__:
            named[name] = function.__globals__[name]
    named |= {f"default {i}": v for i, v in enumerate(function.__defaults__ or ())}
    named |= {f"default {k}": v for k, v in (function.__kwdefaults__ or {}).items()}
    for name, value in named.items():
        described = _plain_value(value)
        if described is not NotImplemented:
            found[f"{path}.{name}"] = described
        elif isinstance(value, FunctionType | MethodType) and value.__module__ == function.__module__:
            _walk_function(value, f"{path}.{name}", found, depth + 1)


def fingerprint(model: nn.Module, objective: Objective) -> dict[str, Any]:
    """Path -> value of the Python constants that the objective and the modules may have used while tracing."""
    found: dict[str, Any] = {}
    _walk_function(objective, "objective", found)
    if not isinstance(objective, FunctionType | MethodType | functools.partial):
        for name, value in getattr(objective, "__dict__", {}).items():
            found[f"objective.{name}"] = _plain_value(value)
        _walk_function(type(objective).__call__, "objective.__call__", found)
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("training", "_parameters", "_buffers", "_modules") or name.endswith("_hooks"):
                continue
            described = _plain_value(value)
            if described is not NotImplemented:
                found[f"{prefix}.{name}"] = described
        found[f"{prefix} hooks"] = tuple(module._forward_hooks) + tuple(module._forward_pre_hooks)
    return found


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def key_of(bound: Bound) -> tuple[Any, ...]:
    """What a graph is valid for: shapes, dtypes, devices, other leaves, modes and the identity of every parameter."""
    model = bound.model
    tensors = tuple((tuple(t.shape), t.dtype, t.device) for t in bound.tensors)
    others = tuple(_hashable(leaf) for leaf in bound._leaves if not isinstance(leaf, Tensor))
    modes = tuple(module.training for module in model.modules())
    state = tuple(
        (name, id(t), tuple(t.shape), t.dtype, t.device) for name, t in model.named_parameters(remove_duplicate=False)
    )
    buffers = tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in model.named_buffers())
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
    return tensors, str(bound._spec), others, modes, state, buffers, autocast


@dataclass
class _Entry:
    graph: Graph | None
    reason: str
    fingerprint: dict[str, Any]


@dataclass
class Cache:
    """Captured graphs by key. A changed Python constant recaptures; one that proves irrelevant is not asked again."""

    size: int = 16
    _entries: dict[Any, _Entry] = field(default_factory=dict)
    _irrelevant: set[str] = field(default_factory=set)

    def get(self, bound: Bound, *, fresh: bool = False) -> tuple[Graph | None, str]:
        """The graph for ``bound``, or None and the reason why it cannot be captured."""
        key = key_of(bound)
        entry = self._entries.get(key)
        now = fingerprint(bound.model, bound.objective)
        if entry is not None and not fresh:
            changed = {p for p in now.keys() | entry.fingerprint.keys() if now.get(p) != entry.fingerprint.get(p)}
            changed -= self._irrelevant
            if not changed:
                return entry.graph, entry.reason
            log.debug("recapturing: %s changed", ", ".join(sorted(changed)))
        else:
            changed = set()
        try:
            graph, reason = capture(bound), ""
        except CaptureError as error:
            graph, reason = None, str(error)
        if entry is not None and graph is not None and entry.graph is not None and graph.text() == entry.graph.text():
            old, new = entry.graph.constants.values(), graph.constants.values()
            if all(a is b for a, b in zip(old, new, strict=True)):
                self._irrelevant |= changed
        self._entries.pop(key, None)
        self._entries[key] = _Entry(graph, reason, now)
        while len(self._entries) > self.size:
            self._entries.pop(next(iter(self._entries)))
        return graph, reason

    def __contains__(self, bound: Bound) -> bool:
        return key_of(bound) in self._entries

    def graphs(self) -> set[Graph]:
        """Those that may be asked for again."""
        return {entry.graph for entry in self._entries.values() if entry.graph is not None}
