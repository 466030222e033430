"""Scaled dot-product attention without dropout, which stays one node of the graph."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import dzkernels

from ..carriers import Carrier, Dense, Zero, dense
from .registry import aten, rule

if TYPE_CHECKING:
    from ..block import Block


def attention_scale(node: Any, q: Tensor) -> float:
    given = node.kwargs.get("scale")
    return 1.0 / math.sqrt(q.shape[-1]) if given is None else float(given)


def attention_base(block: Block, node: Any) -> tuple[Tensor, ...]:
    """Base q, k, v and probabilities, each [.., rows, columns] with what _pairs leaves of the leading dimensions."""
    q, k, v = (block.exact(n) for n in node.args[:3])
    outer = q.shape[:-2]

    def make() -> tuple[Tensor, ...]:
        scores = attention_scale(node, q) * q @ k.transpose(-2, -1)
        mask = node.args[3] if len(node.args) > 3 else None
        if mask is not None:
            given = block.exact(mask)
            scores = scores.masked_fill(~given, -math.inf) if given.dtype is torch.bool else scores + given
        if len(node.args) > 5 and node.args[5]:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        p = torch.softmax(scores, -1).nan_to_num(0.0)  # a row that sees nothing attends to nothing
        return tuple(_pairs(t, outer).to(block.dtype).contiguous() for t in (q, k, v, p))

    return block.saved(node, "attention", make)  # type: ignore[no-any-return]


@rule(aten.scaled_dot_product_attention.default, family="mixes", data=(0, 1, 2))
def attention(block: Block, node: Any) -> Carrier:
    """softmax(scale q k^T + mask) v; q [..., T, D], k [..., S, D], v [..., S, E]."""
    if block.raw(node.args[3] if len(node.args) > 3 else None) is not Zero:
        return block.fallback(node)  # type: ignore[no-any-return]
    q = block.exact(node.args[0])
    outer, base = q.shape[:-2], attention_base(block, node)
    moved = [block.raw(n) for n in node.args[:3]]
    values = [None if d is Zero else dense(d) for d in moved]
    if any(t is not None and t.dtype is not block.operands for t in values):
        values = [None if t is None else t.to(block.dtype) for t in values]
    out = dzkernels.attention_difference(
        *(None if t is None else t.reshape(len(t), *_pairs(t[0], outer).shape) for t in values),
        *base,
        scale=attention_scale(node, q),
        out_dtype=block.operands,
    )
    return Dense(out.reshape(len(out), *block.exact(node).shape))


def _pairs(value: Tensor, outer: tuple[int, ...]) -> Tensor:
    """[N, H, T, D] as it is; any other leading dimensions as one."""
    return value if len(outer) == 2 else value.reshape(-1, *value.shape[-2:])
