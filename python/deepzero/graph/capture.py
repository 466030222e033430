"""Model + objective -> a graph of Core ATen ops whose inputs are the parameters, the buffers and the batch.

The capture is ``torch.export`` in the modes the modules are in, decomposed to Core ATen. Dropout stays one op (its
mask is drawn by the base pass), linear layers, cross-entropy and attention without dropout stay one op each, other
attention and recurrent layers appear in their plain forms.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from ..errors import CaptureError
from ..state import model_kept
from .bound import Bound
from .graph import Graph
from .ops import ATTENTION, KEPT_WHOLE

log = logging.getLogger("deepzero")


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


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """To Core ATen but for ``KEPT_WHOLE``; attention that draws a dropout mask or groups heads comes in its parts."""
    for whole in (KEPT_WHOLE, KEPT_WHOLE - {ATTENTION}):
        table = torch.export.default_decompositions()
        for op in whole:
            table.pop(op, None)
        result = program.run_decompositions(table)
        if not any(_needs_parts(node) for node in result.graph.nodes):
            break
    return result


def _needs_parts(node: fx.Node) -> bool:
    if node.target is not ATTENTION:
        return False
    dropout = bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    leading = {tuple(n.meta["val"].shape[:-2]) for n in node.args[:3] if isinstance(n, fx.Node)}
    return dropout or bool(node.kwargs.get("enable_gqa")) or len(leading) > 1


def _without_effects(graph: fx.Graph) -> None:
    """Take out checks that only raise (torch.linalg's for singular matrices): the ordinary call has made them."""
    for node in reversed(list(graph.nodes)):
        if node.target is not torch.ops.higher_order.with_effects or any(user.args[1] != 0 for user in node.users):
            continue
        for token in list(node.users):
            token.replace_all_uses_with(node.args[0])
            graph.erase_node(token)
        graph.erase_node(node)


def capture(bound: Bound) -> Graph:
    """Trace ``bound``. Raises :class:`CaptureError` with the reason when it cannot be traced."""
    model = bound.model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # export comments on its own internals
            with _plain_forms(), model_kept(model):
                program = torch.export.export(bound, bound.copies(), strict=False)
                program = _decomposed(program)
                _without_effects(program.graph)
    except Exception as error:  # whatever stops the tracer is the reason we report
        reason = str(error).strip().splitlines()
        raise CaptureError(f"{type(error).__name__}: {reason[0] if reason else 'no message'}") from error

    for node in program.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and value.is_complex():
                raise CaptureError("the graph holds complex values, whose differences have no rules")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    buffers_by_id = {id(buffer): name for name, buffer in model.named_buffers()}
    nodes = {node.name: node for node in program.graph.nodes}
    parameters, buffers, constants, batch = {}, {}, {}, []
    for spec in program.graph_signature.input_specs:
        node = nodes.get(spec.arg.name)
        if node is None or spec.kind is InputKind.TOKEN:
            continue
        if spec.kind is InputKind.PARAMETER:
            parameter = bound.get_parameter(str(spec.target))
            if id(parameter) in names:
                parameters[node] = names[id(parameter)]
            else:
                constants[node] = parameter.detach()
        elif spec.kind is InputKind.BUFFER:
            buffer = bound.get_buffer(str(spec.target))
            if id(buffer) in buffers_by_id:
                buffers[node] = buffers_by_id[id(buffer)]
            else:
                constants[node] = buffer
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
