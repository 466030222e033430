"""One block of perturbations through the captured graph: seeds at the parameters, a loss difference each at the end."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .base import Base, is_random, no_autocast, promote, rounded
from .carriers import Carrier, Dense, Zero, dense
from .errors import NoRuleError
from .fusion import Step
from .rules import RULES

_warned: set[str] = set()


def has_rule(node: fx.Node) -> bool:
    return node.target is operator.getitem or node.target in RULES or is_random(node)


class Block:
    """P perturbations on their way through the suffix of a graph; the rules' view of the run.

    count     P
    dtype     what differences are held in
    operands  that of convolutions and matrix products (bfloat16: half-width units, float32 accumulation)
    """

    def __init__(self, base: Base, count: int, *, operands: torch.dtype, strict: bool) -> None:
        self.base = base
        self.count = count
        self.dtype = base.dtype
        self.operands = operands
        self.strict = strict
        self.differences: dict[fx.Node, Any] = {}
        self.moments: dict[fx.Node, Tensor] = {}  # [P, 2, C] of the differences of some convolutions (dense_conv2d)

    # what rules read

    def d(self, arg: Any) -> Any:
        """The carrier of an argument's difference; Zero for everything that is not a moving node."""
        carrier = self.raw(arg)
        if isinstance(carrier, Dense) and carrier.values.dtype is torch.bfloat16:
            return Dense(carrier.values.to(self.dtype))
        return carrier

    def raw(self, arg: Any) -> Any:
        """As :meth:`d`, but values that a fused kernel or a product left in the operand dtype stay in it."""
        return self.differences.get(arg, Zero) if isinstance(arg, fx.Node) else Zero

    def low(self, arg: Any) -> Any:
        """Base value in the query dtype."""
        return self.base.low(arg)

    def exact(self, arg: Any) -> Any:
        """Base value as the float64 base pass left it."""
        return self.base.exact(arg)

    def planes(self, node: fx.Node) -> Tensor:
        """Base images in the query dtype, stored channel by channel."""
        return self.base.planes(node)

    def columns(self, node: fx.Node) -> Tensor:
        """Base value [..., K] in the query dtype, stored feature by feature: [K, ...]."""
        return self.base.columns(node)

    def exact_args(self, node: fx.Node) -> tuple[Any, ...]:
        return fx.map_arg(node.args, self.base.exact)  # type: ignore[no-any-return]

    def exact_kwargs(self, node: fx.Node) -> dict[str, Any]:
        return pytree.tree_map(promote, fx.map_arg(node.kwargs, self.base.exact))  # type: ignore[no-any-return]

    def saved(self, node: fx.Node, name: str, make: Callable[[], Any]) -> Any:
        return self.base.saved(node, name, make)

    def base_rounded(self, value: Any) -> Any:
        return rounded(value, self.dtype)

    def product(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """A convolution or matrix product of differences in the operand dtype; its result stays there for the next."""
        return function(*(t.to(self.operands) for t in tensors))

    def follow(self, node: fx.Node) -> Any:
        """The carrier of one node, by its rule."""
        if all(self.raw(source) is Zero for source in node.all_input_nodes):
            return Zero
        if node.target is operator.getitem:
            source = self.raw(node.args[0])
            return source[node.args[1]] if isinstance(source, tuple | list) else Zero
        if node.target in RULES:
            return RULES[node.target](self, node)
        if is_random(node) and not _distribution_moves(node):
            return Zero
        return self.fallback(node)

    def moved(self, arg: Any, p: int) -> Any:
        """Base value + difference of perturbation p in float64, in the kind of tensor that the op was written for."""
        base, d = self.exact(arg), self.d(arg)
        if d is Zero or not isinstance(base, Tensor):
            return base
        value = base.double() + dense(d)[p].double()
        if base.is_floating_point():
            return value
        return value != 0 if base.dtype is torch.bool else value.round().to(base.dtype)

    def fallback(self, node: fx.Node) -> Any:
        """No rule: op(base + difference) - op(base) in float64, one perturbation at a time. Right, slow and loud."""
        name = str(node.target)
        if is_random(node):
            raise NoRuleError(
                f"{name} draws random numbers whose distribution depends on a parameter, so a query cannot reuse the "
                "draw of the base pass. Draw a fixed random number and transform it (reparametrise), or keep the "
                "parameters before it out of the mask."
            )
        if self.strict:
            raise NoRuleError(
                f"{name} has no difference rule and strict=True forbids the slow fallback. Add a rule "
                "(docs/extending.md: one table row and one small function), or pass strict=False."
            )
        if name not in _warned:
            _warned.add(name)
            warnings.warn(
                f"{name} has no difference rule: it is evaluated in float64 once per query, here "
                f"{self.count} times a block. Results stay right; docs/extending.md shows how to add a rule.",
                stacklevel=2,
            )
        before = self.exact(node)
        rows = []
        for p in range(self.count):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n, p=p: self.moved(n, p))
            args, kwargs = pytree.tree_map(promote, (args, kwargs))
            rows.append(node.target(*args, **kwargs))  # type: ignore[operator]
        if isinstance(before, tuple | list):
            return tuple(self._difference([r[k] for r in rows], b) for k, b in enumerate(before))
        return self._difference(rows, before)

    def _difference(self, rows: Sequence[Tensor], before: Any) -> Carrier:
        if not isinstance(before, Tensor):
            return Zero
        return Dense((torch.stack([r.double() for r in rows]) - before.double()).to(self.dtype))


def run_block(
    base: Base,
    steps: Sequence[Step],
    seeds: Mapping[fx.Node, Carrier],
    count: int,
    *,
    operands: torch.dtype | None = None,
    strict: bool = False,
    observe: Callable[[Step, Any, bool], None] | None = None,
) -> Tensor:
    """Loss differences [P] in float64 of P perturbations that start as ``seeds`` at the placeholders.

    ``steps`` cover the nodes that a seed can reach, in graph order; a value is freed after its last reader.
    ``observe(step, carrier, fused)`` is told of every step.
    """
    block = Block(base, count, operands=operands or base.dtype, strict=strict)
    block.differences.update(seeds)
    loss = base.graph.loss

    def free(step: Step) -> None:
        for source in step.frees:
            block.differences.pop(source, None)
            block.moments.pop(source, None)

    def run(step: Step) -> None:
        carrier = step.apply(block) if step.apply is not None else None
        fused = carrier is not None
        if carrier is not None:
            block.differences[step.nodes[-1]] = carrier
        elif step.parts:
            for part in step.parts:
                run(part)
                free(part)
            return
        else:
            for node in step.nodes:
                carrier = block.follow(node)
                if carrier is not Zero:
                    block.differences[node] = carrier
        if observe is not None:
            observe(step, carrier, fused)

    try:
        with torch.no_grad(), no_autocast():
            for step in steps:
                run(step)
                free(step)
        final = block.d(loss)
    finally:
        block.moments.clear()
        block.differences.clear()  # what remakes a saved base value (HeldBase) still knows the block
    if final is Zero:
        return torch.zeros(count, dtype=torch.float64, device=_device(base))
    return dense(final).reshape(count).double()


def _device(base: Base) -> torch.device:
    value = base.exact(base.graph.loss)
    return value.device if isinstance(value, Tensor) else torch.device("cpu")


_SHAPE_ONLY = ("rand_like", "randn_like", "randint_like", "empty_like")


def _distribution_moves(node: fx.Node) -> bool:
    """Whether a random op reads more than the shape of a moving value."""
    return not any(name in str(node.target) for name in _SHAPE_ONLY)
