"""Losses that stay one node of the graph, because their difference has a form in which nothing cancels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import dzkernels

from ..carriers import Carrier, Dense, Zero, dense
from .registry import aten, rule
from .softmax import log_sum_exp

if TYPE_CHECKING:
    from ..block import Block

_NONE, _MEAN, _SUM = 0, 1, 2  # torch's codes of reduction=


def _argument(node: Any, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


@rule(aten.cross_entropy_loss.default, family="mixes")
def cross_entropy(block: Block, node: Any) -> Carrier:
    """Per sample sum_k q_k (-log p_k), with q one-hot for labels; summed, averaged or kept.

    For labels the difference is log1p(sum_k p_k expm1(dz_k - dz_y)): only differences to the target's own logit
    enter, so it keeps its digits in a trained network too. Other targets take sum_k q_k (dlse - dz_k), in float64.
    """
    target, weight = node.args[1], _argument(node, 2, None)
    if block.d(target) is not Zero or block.d(weight) is not Zero:
        return block.fallback(node)
    logits = block.exact(node.args[0])
    k = 0 if logits.dim() == 1 else 1
    rest = [s for i, s in enumerate(logits.shape) if i != k]
    d = (
        dense(block.d(node.args[0])).movedim(k + 1, -1).flatten(1, -2)
        if rest
        else dense(block.d(node.args[0]))[:, None]
    )
    reduction = _argument(node, 3, _MEAN)
    q, log_p, norm = block.saved(node, "targets", lambda: _targets(block, node, logits, k))
    if isinstance(q, tuple):  # labels
        label, scale = q
        if scale is None and reduction == _MEAN:
            return Dense(dzkernels.cross_entropy_difference(log_p, label, d))
        d = d.double()
        own = d.gather(-1, label.expand(len(d), -1).unsqueeze(-1))
        rows = log_sum_exp(d - own, log_p.exp(), -1).squeeze(-1)
        rows = rows if scale is None else rows * scale
    else:
        d = d.double()
        lse = log_sum_exp(d, log_p.exp(), -1)
        rows = (q * (lse - d)).sum(-1)
    if reduction == _NONE:
        return Dense(rows.reshape(len(rows), *rest))
    return Dense(rows.sum(1) if reduction == _SUM else rows.sum(1) / norm)


def plain_labels(block: Block, node: Any) -> tuple[tuple[Tensor | None, Tensor | None], Tensor]:
    """((labels, their scale), log p [M, K]) when the loss is a mean over labels; (None, None) for other targets."""
    logits = block.exact(node.args[0])
    q, log_p, _ = block.saved(node, "targets", lambda: _targets(block, node, logits, 0 if logits.dim() == 1 else 1))
    if not isinstance(q, tuple) or _argument(node, 3, _MEAN) != _MEAN:
        return (None, None), log_p
    return q, log_p


def _targets(block: Block, node: Any, logits: Tensor, k: int) -> tuple[Any, Tensor, Tensor | float]:
    """(labels and their scale, or coefficients q [M, K]), log p [M, K], and what a mean divides by."""
    target, weight = block.exact(node.args[1]), block.exact(_argument(node, 2, None))
    ignore, smoothing = _argument(node, 4, -100), _argument(node, 5, 0.0)
    log_p = torch.log_softmax(logits.double(), k).movedim(k, -1).reshape(-1, logits.shape[k])
    classes = log_p.shape[1]
    w = torch.ones(classes, dtype=torch.float64, device=logits.device) if weight is None else weight.double()
    if target.is_floating_point():
        t = target.double().movedim(k, -1).reshape(-1, classes)
        t = t * (1 - smoothing) + smoothing / classes
        return t * w, log_p, float(len(t))
    label = target.reshape(-1)
    used = label != ignore
    label = label.clamp(min=0).where(used, 0)
    scale = w[label] * used
    norm = scale.sum()
    if smoothing:
        hot = torch.nn.functional.one_hot(label, classes).double()
        return ((1 - smoothing) * hot + smoothing / classes) * w * used[:, None], log_p, norm
    plain = weight is None and bool(used.all())
    return (label, None if plain else scale), log_p, norm
