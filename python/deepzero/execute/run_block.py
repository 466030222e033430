"""One block of perturbations through the captured graph: seeds at the parameters, a loss difference each at the end."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..base_pass import Base, no_autocast
from ..block import Block
from ..carriers import Carrier, Zero, dense
from ..fusion import LAUNCHES, Step
from ..rules import RULES

Observe = Callable[[Sequence[fx.Node], str, Any], None]
"""``(nodes, kernel, carrier)`` of what ran: a fused kernel by name, or "" for the rule of a single node."""


def follow(block: Block, node: fx.Node) -> Any:
    """The carrier of one node, by its rule."""
    if all(block.raw(source) is Zero for source in node.all_input_nodes):
        return Zero
    if node.target is operator.getitem:
        source = block.raw(node.args[0])
        return source[node.args[1]] if isinstance(source, tuple | list) else Zero
    if node.target in RULES:
        return RULES[node.target](block, node)
    return block.fallback(node)


def run_block(
    base: Base,
    steps: Sequence[Step],
    seeds: Mapping[fx.Node, Carrier],
    count: int,
    *,
    operands: torch.dtype | None = None,
    strict: bool = False,
    warned: set[str] | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Loss differences [P] in float64 of P perturbations that start as ``seeds`` at the placeholders.

    ``steps`` cover the nodes that a seed can reach, in graph order; a value is freed after its last reader.
    ``warned`` holds the ops whose missing rule was warned of.
    """
    block = Block(base, count, operands=operands or base.dtype, strict=strict, warned=warned)
    block.differences.update(seeds)
    final = run_steps(block, steps, observe)
    if final is Zero:
        return torch.zeros(count, dtype=torch.float64, device=_device(base))
    return dense(final).reshape(count).double()


def run_steps(
    block: Block,
    steps: Sequence[Step],
    observe: Observe | None = None,
    follow: Callable[[Block, fx.Node], Any] = follow,
) -> Carrier:
    """The loss's difference after all steps. The block's differences are freed, at the latest when it returns.

    ``follow(block, node)`` gives the difference of one node where no kernel takes it.
    """

    def free(step: Step) -> None:
        for source in step.frees:
            block.differences.pop(source, None)
            block.moments.pop(source, None)

    def run(step: Step) -> None:
        carrier = LAUNCHES[step.pattern](block, step.region) if step.pattern else None
        if carrier is not None:
            block.differences[step.nodes[-1]] = carrier
            if observe is not None:
                observe(step.nodes, step.kernel, carrier)
        elif step.parts:
            for part in step.parts:
                run(part)
                free(part)
        else:
            for node in step.nodes:
                carrier = follow(block, node)
                if carrier is not Zero:
                    block.differences[node] = carrier
                if observe is not None:
                    observe((node,), "", carrier)

    try:
        with torch.no_grad(), no_autocast():
            for step in steps:
                run(step)
                free(step)
        return block.d(block.base.graph.loss)
    finally:
        block.moments.clear()
        block.differences.clear()  # what remakes a saved base value (HeldBase) still knows the block


def _device(base: Base) -> torch.device:
    value = base.exact(base.graph.loss)
    return value.device if isinstance(value, Tensor) else torch.device("cpu")
