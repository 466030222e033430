"""Self-attention of a transformer: (layer norm +) linear + attention + linear (+ residual)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from typing_extensions import Self

import dzkernels

from ..carriers import Carrier, Dense
from ..graph.nodes import Attention, LayerNorm, Linear, Residual, aten
from ..rules import RULES
from ..rules.attention import attention_base, attention_scale
from . import policy
from .linear import input_and_residual, over_rows, row_norm, takes, weights
from .pattern import Pattern, constant
from .region import Region, only_user, with_result

if TYPE_CHECKING:
    from ..block import Block


@dataclass(frozen=True, eq=False)
class Source:
    """Where the queries, keys or values come from: ``features`` [H, D] of the linear ``layer``, through ``views``."""

    layer: Linear
    views: tuple[fx.Node, ...]
    features: Tensor


@dataclass(frozen=True)
class AttentionRegion(Region):
    """No chain of nodes: three ways lead from the input to the attention."""

    norm: LayerNorm | None
    sources: tuple[Source, ...]
    attention: Attention
    project: Linear
    residual: Residual | None

    @property
    def name(self) -> str:
        parts = {"layer_norm": self.norm, "linear+attention+linear": self.attention, "residual": self.residual}
        return "+".join(label for label, part in parts.items() if part is not None)

    @classmethod
    def at(cls, start: fx.Node, inside: Collection[fx.Node], value: fx.Node | None = None) -> Self | None:
        norm = LayerNorm.of(start)
        before = with_result(start, inside) if norm is not None else ()
        if before and over_rows(norm):
            entry, first = before[-1], before[-1]
        elif (layer := Linear.of(start)) is not None and isinstance(layer.input, fx.Node):
            entry, first = layer.input, start
        else:
            return None
        attention = _attention_after(first, inside)
        if attention is None or entry not in inside:
            return None
        sources = tuple(filter(None, map(_source, (attention.query, attention.key, attention.value))))
        layers = list(dict.fromkeys(s.layer for s in sources))
        if len(sources) < 3 or any(layer.input is not entry for layer in layers):
            return None
        merged = _merged_heads(attention, inside)
        after = only_user(merged[-1], inside) if merged else None
        project = Linear.after(merged[-1], after) if after is not None else None
        if project is None or not _stays_cached(sources, layers, project):
            return None
        if not policy.has_fused_kernel("self_attention_difference", project.node.meta["val"].device):
            return None  # its linear layers are taken by their own pattern
        user = only_user(project.node, inside)
        residual = Residual.after(project.node, user) if user is not None else None
        views = dict.fromkeys(view for source in sources for view in source.views)
        nodes = (
            *before, *(layer.node for layer in layers), *views, attention.node, *merged, project.node,
            *([] if residual is None else [residual.node]),
        )  # fmt: skip
        if residual is not None and residual.other in nodes:
            return None
        if any(u in inside and u not in nodes for node in nodes[:-1] for u in node.users):
            return None  # something else reads what would stay inside
        return cls(nodes, norm if before else None, sources, attention, project, residual)


def _stays_cached(sources: tuple[Source, ...], layers: list[Linear], project: Linear) -> bool:
    packed = sum(2 * source.features.numel() for source in sources[1:]) * project.node.meta["val"].shape[1]
    return bool(weights(*layers, project) <= policy.L2_VALUES and packed <= policy.L2_VALUES)


def _attention_after(start: fx.Node, inside: Collection[fx.Node]) -> Attention | None:
    """The attention that ``start`` leads to through at most linear layers and views."""
    todo = [start]
    while todo:
        for user in todo.pop().users:
            if user in inside and (attention := Attention.of(user)) is not None:
                return attention
            if user in inside and (user.target is aten.linear.default or _is_view(user)):
                todo.append(user)
    return None


def _is_view(node: fx.Node) -> bool:
    """Whether torch says that the op's result lies in its input's memory, of an op whose rule only rearranges.

    Views sort the features of linear layers into queries, keys, values and heads.
    """
    rule = RULES.get(node.target)
    return rule is not None and rule.family == "rearranges" and bool(node.target.is_view)  # type: ignore[union-attr]


def _source(value: Any) -> Source | None:
    """What makes an attention's [N, H, T, D] argument, if it is features of a linear layer's [N, T, width]."""
    views: list[fx.Node] = []
    while isinstance(value, fx.Node) and _is_view(value):
        views.insert(0, value)
        value = value.args[0]
    layer = Linear.of(value) if isinstance(value, fx.Node) else None
    if layer is None or layer.node.meta["val"].dim() != 3:
        return None
    samples, tokens, width = layer.node.meta["val"].shape
    seen = torch.empty(samples, tokens, width, device="meta")
    memory = seen.untyped_storage()._cdata
    for view in views:
        seen = view.target(seen, *view.args[1:], **view.kwargs)  # type: ignore[operator]
    if seen.untyped_storage()._cdata != memory:
        return None  # a view (reshape, contiguous) that had to copy
    if seen.dim() != 4 or (seen.shape[0], seen.shape[2]) != (samples, tokens):
        return None
    along_samples, along_heads, along_tokens, along = seen.stride()
    if (along_samples != tokens * width and samples > 1) or (along_tokens != width and tokens > 1):
        return None
    heads, each = torch.arange(seen.shape[1])[:, None], torch.arange(seen.shape[3])
    return Source(layer, tuple(views), heads * along_heads + each * along + int(seen.storage_offset()))


def _merged_heads(attention: Attention, inside: Collection[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes that put the heads of [N, H, T, E] side by side, [N, T, H E]; none where something else follows."""
    swap = only_user(attention.node, inside)
    if swap is None or (swap.target, *swap.args[1:]) not in (
        (aten.permute.default, [0, 2, 1, 3]),
        (aten.transpose.int, 1, 2),
    ):
        return ()
    copy = only_user(swap, inside)
    merge = only_user(copy, inside) if copy is not None and copy.target is aten.clone.default else copy
    if merge is None or merge.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return ()
    samples, heads, tokens, each = attention.node.meta["val"].shape
    if merge.meta["val"].shape != (samples, tokens, heads * each):
        return ()
    return (swap, merge) if copy is None or copy is merge else (swap, copy, merge)


def launch(block: Block, region: AttentionRegion) -> Carrier | None:
    norm, attention, project = region.norm, region.attention, region.project
    layers = [source.layer for source in region.sources]
    if not takes(block, "self_attention_difference", norm, *layers, project) or not constant(block, attention.mask):
        return None

    def features() -> Tensor:
        given = [(block.low(source.layer.weight), source.features) for source in region.sources]
        return torch.cat([weight[features.to(weight.device)] for weight, features in given], 1)

    values, extra = input_and_residual(block, norm or layers[0], region.residual)
    q, k, v, p = attention_base(block, attention)
    out = dzkernels.self_attention_difference(
        values, block.saved(attention.node, "features", features), q, k, v, p, block.low(project.weight), extra,
        row_norm(block, norm), scale=attention_scale(attention, q), operands=block.operands,
        out_dtype=block.operands if extra is None else block.dtype,
    )  # fmt: skip
    return Dense(out.reshape(block.count, *block.exact(project.node).shape))


ATTENTION = Pattern("self-attention", AttentionRegion, launch)
