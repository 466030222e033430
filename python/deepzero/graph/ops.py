"""Facts about single ops that the capture and the base pass need.

Everything else that is known of an op stands with its rule (``rules/registry.py``). The capture and the base pass lie
below the rules and cannot read that table, so what they need stands here, and the floors above read it here too.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default

KEPT_WHOLE = frozenset({aten.linear.default, aten.cross_entropy_loss.default, ATTENTION})
"""Ops outside Core ATen that the capture does not decompose: their rules are better than those of their parts."""

HALF_TO_FLOAT = frozenset({aten._softmax.default, aten._log_softmax.default})
"""Ops whose third argument asks for a float32 result of a float16 input, which the float64 base pass must not have."""

LOOKUPS = frozenset({aten.embedding.default, aten._embedding_bag.default, aten._embedding_bag_forward_only.default})
"""Ops that read rows of a table, their first argument, by index: what they cost must not grow with rows never read."""


def is_random(node: fx.Node) -> bool:
    """Whether the op draws from a global generator."""
    if node.target is ATTENTION:
        return False  # stays whole only without dropout
    if node.target is aten.rrelu_with_noise_functional.default and not (len(node.args) > 4 and node.args[4]):
        return False  # a plain leaky ReLU outside of training
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
