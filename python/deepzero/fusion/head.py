"""Linear layer + cross-entropy of labels, for a difference in one feature."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

import dzkernels

from ..carriers import Carrier, Dense, OneChannel
from ..graph.nodes import CrossEntropy, Linear
from ..rules.loss import plain_labels
from .pattern import Pattern, constant
from .region import Region

if TYPE_CHECKING:
    from ..block import Block


@dataclass(frozen=True)
class HeadRegion(Region):
    layer: Linear
    loss: CrossEntropy

    def fits(self, inside: Collection[fx.Node]) -> bool:
        return bool(self.layer.node.meta["val"].dim() == 2)


def launch(block: Block, region: HeadRegion) -> Carrier | None:
    layer, loss = region.layer, region.loss
    d = block.raw(layer.input)
    if not (isinstance(d, OneChannel) and d.dim == 1 and block.dtype is torch.float32):
        return None
    if not constant(block, layer.weight, layer.bias, *loss.others):
        return None
    (label, scale), log_p = plain_labels(block, loss.node)
    if label is None or scale is not None:
        return None
    return Dense(dzkernels.channel_linear_cross_entropy(d.values, d.channel, block.low(layer.weight), log_p, label))


HEAD = Pattern("head", HeadRegion, launch)
