"""The table op -> :class:`Rule`, and the families that turn one small function into a rule.

A rule takes the running block and a node of the graph, and returns the carrier of the node's difference (or a tuple
of carriers for an op with several results):

    rule(block, node) -> Carrier

``block.d(arg)`` is the carrier of an argument, ``block.low(arg)`` its base value in the query dtype and
``block.exact(arg)`` in float64. Most ops need no such function; three families write it for them:

    linear(op, positions)       the difference goes through the same map
    pointwise(op, ...)          one elementwise function of differences and saved base values
    discrete(op)                piecewise constant: op(base + difference) - op(base), at float64 precision

Others are written by hand and registered with ``@rule(op, family=...)``. What is known of an op stands on its entry of
the table and nowhere else; only what the capture and the base pass need lies below, in ``graph/ops.py``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ..carriers import (
    Carrier,
    Dense,
    OneChannel,
    OneEntry,
    Zero,
    dense,
    one_channel,
    same_channel,
    select,
    without,
)
from ..graph.ops import is_random

if TYPE_CHECKING:
    from ..block import Block


aten = torch.ops.aten

Function = Callable[["Block", fx.Node], Any]

Family = Literal["pointwise", "discrete", "rearranges", "linear", "mixes", "constant", "opaque"]
"""What an op does to a difference; ``tests/rules/test_families.py`` holds every rule to it.

pointwise   an entry of the result moves only where an operand moves at the same place, counted after broadcasting
discrete    the same, and the result jumps
rearranges  every entry of the result's difference is an entry of an operand's difference, or zero
linear      twice the difference of the operands gives twice the difference of the result
mixes       none of these: one moving entry moves many, by a formula of its own
constant    the result depends on the shape of its input alone and never moves
opaque      runs code of the user, at a cost and with effects of its own: only queries may call it
"""


@dataclass(frozen=True)
class Rule:
    """The entry of one op; called as ``rule(block, node)``.

    function  computes the carrier of the result's difference
    family    what the op does to a difference
    data      positions of the arguments that carry activations; the others are weights, masks and settings
    """

    function: Function
    family: Family
    data: tuple[int, ...] = (0,)

    def __call__(self, block: Block, node: fx.Node) -> Any:
        return self.function(block, node)


RULES: dict[Any, Rule] = {}


def rule(*ops: Any, family: Family, data: Sequence[int] = (0,)) -> Callable[[Function], Function]:
    """Register one function as the rule of ``ops``; see :class:`Rule`.

    Raises ValueError for an unknown family and for an op that has a rule already.
    """
    if family not in get_args(Family):
        raise ValueError(f"family must be one of {', '.join(get_args(Family))}, got {family!r}")

    def register(function: Function) -> Function:
        for op in ops:
            if op in RULES:
                raise ValueError(f"{op} already has a rule: {RULES[op].function.__qualname__}")
            RULES[op] = Rule(function, family, tuple(data))
        return function

    return register


def has_rule(node: fx.Node) -> bool:
    return node.target is operator.getitem or node.target in RULES or is_random(node)


def missing_rules(suffix: Sequence[fx.Node]) -> tuple[str, ...]:
    return tuple(sorted({str(node.target) for node in suffix if not has_rule(node)}))


# --- linear maps


Follow = Callable[[fx.Node, int], int | None]
"""Where channel dimension ``dim`` of the input goes when it passes through the node, or None if it is mixed up."""


def linear(op: Any, *positions: int, follow: Follow | None = None, moves: bool = False, dim: int | None = None) -> None:
    """``op`` is linear in the tensors at ``positions`` together; every other argument is constant.

    With ``follow`` (for a single position) a OneChannel difference stays one: the op is applied to a value whose
    channel dimension has size 1. ``moves`` says that values are only moved about, so they may stay in half width.
    ``dim`` is the position of the argument that names the only dimension it works on.
    """
    positions = positions or (0,)

    def apply(block: Block, node: fx.Node) -> Any:
        moved = [node.args[i] for i in positions if i < len(node.args)]
        if any(block.d(n) is not Zero for n in node.all_input_nodes if not _contains(moved, n)):
            return block.fallback(node)  # an index or a mask moves: not linear any more
        if follow is not None and len(positions) == 1:
            d = block.raw(node.args[positions[0]])
            d = one_channel(d, _largest(d.shape)) if isinstance(d, OneEntry) and d.shape else d
            if isinstance(d, OneChannel):
                target = follow(node, d.dim)
                if target is not None:
                    args = list(block.exact_args(node))
                    args[positions[0]] = d.values.unsqueeze(d.dim + 1)
                    out = _batched(block, node, args, positions)
                    assert isinstance(out, Tensor)
                    shape = tuple(block.exact(node).shape)
                    return OneChannel(shape, target, d.channel, out.squeeze(target + 1))
        args = list(block.exact_args(node))
        for i in positions:
            if i < len(args):
                args[i] = _dense_like(block, node.args[i], block.raw if moves else block.d)
        leaves = [t for t in pytree.tree_leaves([args[i] for i in positions if i < len(args)]) if isinstance(t, Tensor)]
        held = functools.reduce(torch.promote_types, (t.dtype for t in leaves))
        for i in positions:
            if i < len(args):
                args[i] = pytree.tree_map(lambda t: t.to(held) if isinstance(t, Tensor) else t, args[i])
        if dim is not None and dim < len(args):  # a plain call is much cheaper than vmap
            args[dim] = args[dim] % (args[0].dim() - 1) + 1
            out = node.target(*args, **block.exact_kwargs(node))  # type: ignore[operator]
        else:
            out = _batched(block, node, args, positions)
        return tuple(Dense(o) for o in out) if isinstance(out, tuple | list) else Dense(out)

    rule(op, family="rearranges" if moves else "linear", data=positions)(_named(apply, f"linear {op}"))


def _contains(args: Any, node: fx.Node) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(args, found.append)
    return node in found


def _dense_like(block: Block, arg: Any, read: Callable[[Any], Any]) -> Any:
    """The dense difference of a node, or of every node of a list; zeros where nothing moves."""
    if isinstance(arg, list | tuple):
        return [_dense_like(block, a, read) for a in arg]
    if not isinstance(arg, fx.Node):
        return arg
    d = read(arg)
    if d is Zero:
        base = block.exact(arg)
        return torch.zeros((block.count, *base.shape), dtype=block.dtype, device=base.device)
    return dense(d)


def _batched(block: Block, node: fx.Node, args: Sequence[Any], positions: Sequence[int]) -> Any:
    """``op`` for every perturbation at once; only the arguments at ``positions`` have a leading P."""
    kwargs, where = block.exact_kwargs(node), [i for i in positions if i < len(args)]

    def once(*moved: Any) -> Any:
        full = list(args)
        for i, value in zip(where, moved, strict=True):
            full[i] = value
        return node.target(*full, **kwargs)  # type: ignore[operator]

    return torch.vmap(once)(*(args[i] for i in where))


def _largest(shape: Sequence[int]) -> int:
    return max(range(len(shape)), key=lambda k: shape[k])


def _named(function: Function, name: str) -> Function:
    function.__qualname__ = name
    return function


# --- elementwise functions


def pointwise(
    *ops: Any, arity: int = 1, saves: Callable[..., Any] | None = None, exact: bool = False, half: bool = False
) -> Any:
    """Register an elementwise rule ``f(*differences, *saved, *rest) -> difference``.

    arity  how many leading arguments are tensors (or numbers) that may move; a difference is None where one does not
    saves  ``saves(*bases, *rest)`` -> tensors derived from the float64 bases, kept in the query dtype and shared by
           all blocks; by default the bases themselves
    exact  hand everything over in float64: for functions whose result jumps
    half   differences may come in half width: the function widens them itself, and its result may stay so
    ``rest`` are the op's remaining arguments.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def apply(block: Block, node: fx.Node) -> Carrier:
            operands, rest, kwargs = node.args[:arity], node.args[arity:], node.kwargs
            rest = tuple(block.exact(a) for a in rest)
            if any(isinstance(a, fx.Node) and block.d(a) is not Zero for a in node.args[arity:]):
                return block.fallback(node)

            def make() -> tuple[Any, ...]:
                bases = tuple(block.exact(a) for a in operands)
                wide = tuple(b.double() if isinstance(b, Tensor) else b for b in bases)
                out = wide if saves is None else saves(*wide, *rest, **kwargs)
                out = out if isinstance(out, tuple) else (out,)
                return out if exact else tuple(block.base_rounded(o) for o in out)

            saved = block.saved(node, "pointwise", make)
            shape = tuple(block.exact(node).shape)
            diffs, bases, wrap = align(block, operands, saved, shape, block.raw if half else block.d)
            if not exact:
                return wrap(function(*diffs, *bases, *rest, **kwargs))
            # float64 only inside: what follows meets the dtype that came in
            held = functools.reduce(torch.promote_types, (d.dtype for d in diffs if d is not None))
            return wrap(function(*(d if d is None else d.double() for d in diffs), *bases, *rest, **kwargs).to(held))

        for op in ops:
            rule(op, family="pointwise", data=range(arity))(_named(apply, f"pointwise {function.__name__}"))
        return function

    return register


def align(
    block: Block, operands: Sequence[Any], saved: Sequence[Any], shape: tuple[int, ...], read: Callable[[Any], Any]
) -> tuple[list[Tensor | None], list[Any], Callable[[Tensor], Carrier]]:
    """Bring differences and saved base tensors of a broadcasting op to one layout.

    Returns the differences (None where nothing moves), the saved tensors, and how to wrap the result. When every
    difference lies in the same channel of the result, everything is cut down to that channel.
    """
    rank = len(shape)
    carriers = [read(a) for a in operands]
    prepared: list[Any] = []
    for c in carriers:
        if isinstance(c, OneEntry):
            sizes = [s if s == shape[rank - len(c.shape) + k] else 0 for k, s in enumerate(c.shape)]
            c = one_channel(c, _largest(sizes)) if sizes and max(sizes) > 1 else Dense(dense(c))
        prepared.append(c)
    channels = [c for c in prepared if c is not Zero]
    first = channels[0]
    if all(isinstance(c, OneChannel) for c in channels):
        dims = {rank - len(c.shape) + c.dim for c in channels}
        dim = min(dims)
        fits = all(c.shape[c.dim] == shape[dim] for c in channels) if len(dims) == 1 else False
        if fits and all(c is first or _same_index(c, first) for c in channels):
            rest = without(shape, dim)

            def cut(base: Any) -> Any:
                if not isinstance(base, Tensor):
                    return base
                at = dim - (rank - base.dim())
                if at < 0:
                    return base
                if base.shape[at] == 1 and shape[dim] != 1:
                    return base.squeeze(at)
                return _raise(select(base, at, first.channel), rank - 1)

            diffs = [None if c is Zero else _raise(c.values, rank - 1) for c in prepared]

            def wrap(values: Tensor) -> Carrier:
                return OneChannel(shape, dim, first.channel, values.expand(len(first.channel), *rest))

            return diffs, [cut(b) for b in saved], wrap

    def spread(values: Tensor) -> Carrier:
        return Dense(values.expand(len(values), *shape))

    return [None if c is Zero else _raise(dense(c), rank) for c in prepared], list(saved), spread


def _raise(values: Tensor, rank: int) -> Tensor:
    """[P, *s] -> [P, 1, .., 1, *s] with ``rank`` dimensions after P."""
    missing = rank - (values.dim() - 1)
    return values.reshape(len(values), *([1] * missing), *values.shape[1:]) if missing else values


def _same_index(a: OneChannel, b: OneChannel) -> bool:
    return same_channel(OneChannel(a.shape, 0, a.channel, a.values), OneChannel(b.shape, 0, b.channel, b.values))


# --- piecewise constant functions


def discrete(*ops: Any, arity: int = 1) -> None:
    """``op(base + difference) - op(base)`` for elementwise ops whose value only jumps; both in float64."""

    for op in ops:

        def apply(block: Block, node: fx.Node, op: Any = op) -> Carrier:
            operands = node.args[:arity]
            if all(block.d(a) is Zero for a in operands):
                return Zero
            bases = tuple(_double(block.exact(a)) for a in operands)
            before = block.exact(node)
            shape = tuple(before.shape)
            diffs, saved, wrap = align(block, operands, (*bases, before), shape, block.d)
            inputs = [
                _typed(block, a, b if d is None else b + d.double())
                for a, b, d in zip(operands, saved[:-1], diffs, strict=True)
            ]
            after = op(*inputs, *block.exact_args(node)[arity:], **block.exact_kwargs(node))
            return wrap((after.double() - _double(saved[-1])).to(block.dtype))

        rule(op, family="discrete", data=range(arity))(_named(apply, f"discrete {op}"))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _typed(block: Block, arg: Any, value: Any) -> Any:
    """A float64 value back in the kind (bool, integer, float) that the op was written for."""
    base = block.exact(arg)
    if not isinstance(base, Tensor) or not isinstance(value, Tensor) or base.is_floating_point():
        return value
    return value != 0 if base.dtype is torch.bool else value.round().to(base.dtype)
