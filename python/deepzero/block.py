"""What a rule sees: P perturbations on their way through a graph, their differences, and the base values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .base_pass import Base, promote, rounded
from .carriers import Carrier, Dense, Zero, dense
from .errors import NoRuleError
from .graph.ops import is_random


class Block:
    """P perturbations on their way through the suffix of a graph; the rules' view of the run.

    count     P
    dtype     what differences are held in
    operands  that of convolutions and matrix products (bfloat16: half-width units, float32 accumulation)
    strict    an op without a rule is an error
    warned    ops without a rule that a warning has named already
    """

    def __init__(
        self, base: Base, count: int, *, operands: torch.dtype, strict: bool, warned: set[str] | None = None
    ) -> None:
        self.base = base
        self.count = count
        self.dtype = base.dtype
        self.operands = operands
        self.strict = strict
        self.warned = set() if warned is None else warned
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
        return fx.map_arg(node.args, self.base.exact)

    def exact_kwargs(self, node: fx.Node) -> dict[str, Any]:
        return pytree.tree_map(promote, fx.map_arg(node.kwargs, self.base.exact))

    def saved(self, node: fx.Node, name: str, make: Callable[[], Any]) -> Any:
        return self.base.saved(node, name, make)

    def base_rounded(self, value: Any) -> Any:
        return rounded(value, self.dtype)

    def product(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """A convolution or matrix product of differences in the operand dtype; its result stays there for the next."""
        return function(*(t.to(self.operands) for t in tensors))

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
        if name not in self.warned:
            self.warned.add(name)
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
