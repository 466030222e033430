"""Holds rules to the families that they declare, on the nodes that a row of the table runs through."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from deepzero.base_pass import Base
from deepzero.block import Block
from deepzero.carriers import Carrier, OneChannel, OneEntry, Zero, dense
from deepzero.errors import NoRuleError
from deepzero.execute.run_block import follow
from deepzero.plan.route import reach
from deepzero.rules import RULES, Rule
from rules.subject import Subject


@dataclass
class Seen:
    """One call of a rule: the differences that came in by node, and the first one that went out."""

    block: Block
    node: fx.Node
    came: dict[fx.Node, Any]
    out: Carrier

    @property
    def places(self) -> tuple[int, ...]:
        value = self.block.exact(self.node)
        return tuple((value[0] if isinstance(value, tuple | list) else value).shape)

    def operands(self, entry: Rule) -> list[fx.Node]:
        return [a for i in entry.data if i < len(self.node.args) and isinstance(a := self.node.args[i], fx.Node)]


def calls(base: Base, name: str, shape: torch.Size) -> Iterator[Seen]:
    """Every rule that one perturbed coordinate of a parameter calls, node by node; what has no rule ends the walk."""
    block = Block(base, 1, operands=base.dtype, strict=True)
    index = torch.tensor([[min(k, size - 1) for k, size in enumerate(shape)]], dtype=torch.int64).reshape(1, -1)
    for node in base.graph.placeholders(name):
        block.differences[node] = OneEntry(tuple(shape), index, torch.full((1,), 0.125, dtype=base.dtype))
    for node in reach(base.graph, [name]):
        came = {n: block.raw(n) for n in node.all_input_nodes if block.raw(n) is not Zero}
        try:
            out = follow(block, node)
        except NoRuleError:
            return
        if out is not Zero:
            block.differences[node] = out
        if came and node.target in RULES:
            yield Seen(block, node, came, out[0] if isinstance(out, tuple) else out)


def seen_in(subject: Subject) -> Iterator[Seen]:
    """The rules that every parameter's coordinates call."""
    with torch.no_grad(), subject.estimator("float32").engine.prepared(subject.batch) as ready:
        if ready.base is not None:
            for name, parameter in subject.model.named_parameters():
                yield from calls(ready.base, name, parameter.shape)


def moving(carrier: Carrier, shape: tuple[int, ...]) -> Tensor:
    """Where it is not zero, [*shape] after broadcasting."""
    if carrier is Zero:
        return torch.zeros(shape, dtype=torch.bool)
    return (dense(carrier)[0] != 0).broadcast_to(shape)


def stays_in_place(seen: Seen, entry: Rule) -> str:
    came = torch.zeros(seen.places, dtype=torch.bool)
    for d in seen.came.values():
        if d is not Zero and math.prod(torch.broadcast_shapes(d.shape, seen.places)) == math.prod(seen.places):
            came |= moving(d, seen.places)
    if bool((moving(seen.out, seen.places) & ~came).any()):
        return "an entry moves where no operand does"
    sources = [d for n in seen.operands(entry) if (d := seen.came.get(n, Zero)) is not Zero]
    one = sources[0] if len(sources) == 1 else Zero
    kept = isinstance(one, OneChannel) and tuple(one.shape) == seen.places
    return "one channel came in and many go out" if kept and not isinstance(seen.out, OneChannel) else ""


def only_rearranges(seen: Seen, entry: Rule) -> str:
    if seen.out is Zero:
        return ""
    came = torch.cat([dense(d).double().flatten() for d in seen.came.values()])
    return "" if bool(torch.isin(dense(seen.out).double(), came).logical_or(dense(seen.out) == 0).all()) else (
        "an entry of the result is none of the operands"
    )  # fmt: skip


def doubled(carrier: Any) -> Any:
    if isinstance(carrier, OneEntry):
        return replace(carrier, step=2 * carrier.step)
    return replace(carrier, values=2 * carrier.values)


def is_linear(seen: Seen, entry: Rule) -> str:
    if any(isinstance(d, tuple) for d in seen.came.values()) or seen.out is Zero:
        return ""
    block = Block(seen.block.base, 1, operands=seen.block.dtype, strict=True)
    block.differences.update({node: doubled(d) for node, d in seen.came.items()})
    out = entry(block, seen.node)
    out = out[0] if isinstance(out, tuple) else out
    return "" if torch.equal(dense(out), 2 * dense(seen.out)) else "twice the difference does not give twice the result"


def never_moves(seen: Seen, entry: Rule) -> str:
    return "" if seen.out is Zero else "the result moves"


HOLDS = {
    "pointwise": stays_in_place,
    "discrete": stays_in_place,
    "rearranges": only_rearranges,
    "linear": is_linear,
    "constant": never_moves,
}


def fault(seen: Seen, entry: Rule) -> str:
    """How one call contradicts the declared family, or ""."""
    check = HOLDS.get(entry.family)
    return check(seen, entry) if check is not None else ""


def contradictions(subject: Subject) -> list[str]:
    return sorted({f"{s.node.target}: {text}" for s in seen_in(subject) if (text := fault(s, RULES[s.node.target]))})
