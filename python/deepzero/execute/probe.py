"""One block of one perturbation through a schedule, at plan time: which kernels run, and what differences take.

Every tensor of a carrier has the perturbations as its first dimension, so P perturbations take P times the bytes of
one. Which carriers travel depends on the carriers that start and on the graph alone, with one exception, two tied uses
of a parameter: a coordinate may move the same channel of both, or two. :func:`coordinate` is one that moves two.

The block starts with a step of zero, so that rules meet no value that the base pass has not met. It calls no code of
the user, and what has no rule is not evaluated: both give dense differences. Nothing is written but what the base pass
saves for every block of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..base_pass import Base
from ..block import Block
from ..carriers import Carrier, Dense, OneChannel, OneEntry, Zero, describe
from ..fusion import Step
from ..plan.probe import Ran
from ..rules import RULES
from .run_block import follow, run_steps


def coordinate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> OneEntry:
    """A step of zero at entry [0, 1, 2, ...], off the diagonal; the last of its dimension where there is no such."""
    index = [min(k, size - 1) for k, size in enumerate(shape)]
    where = torch.tensor(index, dtype=torch.int64, device=device).reshape(1, len(index))
    return OneEntry(tuple(shape), where, torch.zeros(1, dtype=dtype, device=device))


def everything(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Dense:
    """A step of zero in every entry."""
    return Dense(torch.zeros((1, *shape), dtype=dtype, device=device))


def probe(
    base: Base, steps: Sequence[Step], seeds: Mapping[fx.Node, Carrier], *, operands: torch.dtype, count: int = 1
) -> tuple[Ran, ...]:
    """Run ``count`` perturbations once from ``seeds`` (placeholder -> difference), whose own memory does not count."""
    block = _Probing(base, count, operands=operands, strict=False)
    block.differences.update(seeds)
    starts = _memory(seeds.values())
    ran: list[Ran] = []

    def observe(nodes: Sequence[fx.Node], kernel: str, carrier: Any) -> None:
        held = [*block.differences.items(), *block.moments.items()]
        before = starts | _memory(value for node, value in held if node not in nodes)
        alive = starts | _memory(value for _, value in held)
        size = sum(alive.values()) - sum(before.values())
        what = kernel or f"rule {nodes[-1].target}"
        ran.append(Ran(what, describe(carrier), size, sum(alive.values()) - sum(starts.values())))

    run_steps(block, steps, observe, _rule)
    return tuple(ran)


class _Probing(Block):
    def fallback(self, node: fx.Node) -> Any:
        """What an op without a rule would return, all zero."""
        value = self.exact(node)
        if isinstance(value, tuple | list):
            return tuple(self._zeros(v) for v in value)
        return self._zeros(value)

    def _zeros(self, value: Any) -> Carrier:
        if not isinstance(value, Tensor):
            return Zero
        return Dense(torch.zeros((self.count, *value.shape), dtype=self.dtype, device=value.device))


def _rule(block: Block, node: fx.Node) -> Any:
    if node.target in RULES and RULES[node.target].family == "opaque":
        moves = any(block.raw(source) is not Zero for source in node.all_input_nodes)
        return block.fallback(node) if moves else Zero
    return follow(block, node)


def _memory(carriers: Iterable[Any]) -> dict[int, int]:
    """Address -> bytes of all memory that these carriers and tensors lie in."""
    found = {}
    for tensor in _tensors(carriers):
        memory = tensor.untyped_storage()
        found[memory.data_ptr()] = memory.nbytes()
    return found


def _tensors(carriers: Iterable[Any]) -> Iterator[Tensor]:
    for carrier in carriers:
        if isinstance(carrier, Tensor):
            yield carrier
        elif isinstance(carrier, tuple | list):
            yield from _tensors(carrier)
        elif isinstance(carrier, OneEntry | OneChannel | Dense):
            yield from _tensors(vars(carrier).values())
