"""Scaled dot-product attention without dropout, which stays one node of the graph."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

import dzkernels

from ..carriers import Carrier, Dense, Zero, dense
from ..graph.nodes import Attention
from .registry import aten, rule

if TYPE_CHECKING:
    from ..block import Block


def attention_scale(attention: Attention, q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if attention.scale is None else float(attention.scale)


def attention_base(block: Block, attention: Attention) -> tuple[Tensor, ...]:
    """Base q, k, v and probabilities, each [.., rows, columns] with what _pairs leaves of the leading dimensions."""
    q, k, v = map(block.exact, (attention.query, attention.key, attention.value))
    outer = q.shape[:-2]

    def make() -> tuple[Tensor, ...]:
        scores = attention_scale(attention, q) * q @ k.transpose(-2, -1)
        if attention.mask is not None:
            given = block.exact(attention.mask)
            scores = scores.masked_fill(~given, -math.inf) if given.dtype is torch.bool else scores + given
        if attention.causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        p = torch.softmax(scores, -1).nan_to_num(0.0)  # a row that sees nothing attends to nothing
        return tuple(_pairs(t, outer).to(block.dtype).contiguous() for t in (q, k, v, p))

    return block.saved(attention.node, "attention", make)


@rule(aten.scaled_dot_product_attention.default, family="mixes", data=(0, 1, 2))
def attention(block: Block, node: fx.Node) -> Carrier:
    """softmax(scale q k^T + mask) v; q [..., T, D], k [..., S, D], v [..., S, E]."""
    view = Attention.of(node)
    assert view is not None
    if block.raw(view.mask) is not Zero:
        return block.fallback(node)
    q = block.exact(view.query)
    outer, base = q.shape[:-2], attention_base(block, view)
    moved = [block.raw(n) for n in (view.query, view.key, view.value)]
    values = [None if d is Zero else dense(d) for d in moved]
    if any(t is not None and t.dtype is not block.operands for t in values):
        values = [None if t is None else t.to(block.dtype) for t in values]
    out = dzkernels.attention_difference(
        *(None if t is None else t.reshape(len(t), *_pairs(t[0], outer).shape) for t in values),
        *base,
        scale=attention_scale(view, q),
        out_dtype=block.operands,
    )
    return Dense(out.reshape(len(out), *block.exact(node).shape))


def _pairs(value: Tensor, outer: tuple[int, ...]) -> Tensor:
    """[N, H, T, D] as it is; any other leading dimensions as one."""
    return value if len(outer) == 2 else value.reshape(-1, *value.shape[-2:])
