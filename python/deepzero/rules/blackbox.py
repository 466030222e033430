"""The rule of an opaque function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ..blackbox import box_of
from ..carriers import Carrier, Dense, Zero, dense
from ..errors import ObjectiveError
from .registry import rule

if TYPE_CHECKING:
    from ..block import Block


@rule(torch.ops.deepzero.blackbox.default, family="opaque", data=(1,))
def _rule(block: Block, node: fx.Node) -> Carrier:
    """f(x + dx) - f(x) in float64; all perturbations as one call when rows are independent."""
    box, args = box_of(node.args[0]), node.args[1]
    before = block.exact(node).double()
    if not box.batched:
        after = torch.stack(
            [_call(block, node, [block.moved(arg, p) for arg in args], before.shape) for p in range(block.count)]
        )  # type: ignore[union-attr]
        return Dense((after - before).to(block.dtype))
    rows = []
    for arg in args:  # type: ignore[union-attr]
        base, d = block.exact(arg), block.d(arg)
        constant = base.unsqueeze(0).expand(block.count, *base.shape)
        moved = constant if d is Zero else constant.double() + dense(d).double()
        if d is not Zero and not base.is_floating_point():
            moved = moved != 0 if base.dtype is torch.bool else moved.round().to(base.dtype)
        rows.append(moved.flatten(0, 1))
    after = _call(block, node, rows, torch.Size((len(rows[0]), *before.shape[1:]))).unflatten(0, (block.count, -1))
    return Dense((after - before).to(block.dtype))


def _call(block: Block, node: fx.Node, inputs: list[Tensor], shape: torch.Size) -> Tensor:
    """One call, from the random state of the base pass. Raises ObjectiveError for another shape than ``shape``."""
    box = box_of(node.args[0])
    with block.base.boxes[node].restored():
        out = box.evaluate(inputs)
    if out.shape != shape:
        raise ObjectiveError(
            f"black box {box.__name__!r} returned shape {list(out.shape)} in a query, where the base makes it "
            f"{list(shape)}. Its result's shape must follow from the shapes of its inputs alone."
        )
    return out
