"""The rule of an opaque function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from ..carriers import Carrier, Dense, Zero, dense
from .registry import rule

if TYPE_CHECKING:
    from ..block import Block
from ..blackbox import _boxes


@rule(torch.ops.deepzero.blackbox.default, family="opaque", data=(1,))
def _rule(block: Block, node: fx.Node) -> Carrier:
    """f(x + dx) - f(x) in float64; all perturbations as one call when rows are independent."""
    box, args = _boxes[node.args[0]], node.args[1]  # type: ignore[index]
    before = block.exact(node).double()
    if box.batched:
        rows = []
        for arg in args:  # type: ignore[union-attr]
            base, d = block.exact(arg), block.d(arg)
            still = base.unsqueeze(0).expand(block.count, *base.shape)
            moved = still if d is Zero else still.double() + dense(d).double()
            if d is not Zero and not base.is_floating_point():
                moved = moved != 0 if base.dtype is torch.bool else moved.round().to(base.dtype)
            rows.append(moved.flatten(0, 1))
        after = box.evaluate(rows).unflatten(0, (block.count, -1))
    else:
        after = torch.stack(
            [box.evaluate([block.moved(arg, p) for arg in args]) for p in range(block.count)]  # type: ignore[union-attr]
        )
    return Dense((after - before).to(block.dtype))
