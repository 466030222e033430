"""Opaque functions inside a model or an objective: simulators, remote classifiers, whatever only returns numbers."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import ObjectiveError

_boxes: weakref.WeakValueDictionary[int, BlackBox] = weakref.WeakValueDictionary()
_handles = itertools.count()

_library = torch.library.Library("deepzero", "DEF")
_library.define("blackbox(int handle, Tensor[] inputs) -> Tensor")


class BlackBox:
    """A callable of tensors that a captured graph may contain as one opaque node. Made by :func:`blackbox`.

    calls  times the wrapped function was called
    rows   rows it was given in all (with ``batched``; otherwise equal to ``calls``)
    """

    def __init__(self, function: Callable[..., Any], *, batched: bool, dtype: torch.dtype) -> None:
        self.function = function
        self.batched = batched
        self.dtype = dtype
        self.calls = 0
        self.rows = 0
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self._seen: dict[Any, torch.Size] = {}
        self.handle = next(_handles)
        _boxes[self.handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = next(_handles)  # a copy is a box of its own
        _boxes[self.handle] = self

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not inputs or not all(isinstance(t, Tensor) for t in inputs):
            kinds = ", ".join(type(t).__name__ for t in inputs) or "nothing"
            raise TypeError(
                f"black box {self.__name__!r} takes one or more positional tensors, got {kinds}. Bind anything else "
                "with functools.partial."
            )
        return torch.ops.deepzero.blackbox(self.handle, list(inputs))

    def evaluate(self, inputs: list[Tensor]) -> Tensor:
        """One call of the wrapped function, in the dtype it asked for; the result in float64."""
        given = [t.detach().to(self.dtype if t.is_floating_point() else t.dtype, copy=True) for t in inputs]
        self.calls += 1  # also of one that fails: it may have been paid for
        self.rows += len(inputs[0]) if self.batched and inputs[0].dim() else 1
        result = self.function(*given)
        try:
            out = torch.as_tensor(result, device=inputs[0].device).detach()
        except (TypeError, ValueError, RuntimeError):
            raise ObjectiveError(
                f"black box {self.__name__!r} returned {type(result).__name__}. It must return one tensor, array or "
                "number."
            ) from None
        if out.is_complex():
            raise ObjectiveError(f"black box {self.__name__!r} returned {out.dtype}. It must return real numbers.")
        if self.batched and (out.dim() == 0 or len(out) != len(inputs[0])):
            raise ObjectiveError(
                f"black box {self.__name__!r} was given {len(inputs[0])} rows and returned shape {list(out.shape)}. "
                "With batched=True it must return one row per input row; pass batched=False if rows depend on each "
                "other."
            )
        return out.double()


def box_of(handle: Any) -> BlackBox:
    """The box of a node's first argument."""
    return _boxes[handle]


@torch.library.impl(_library, "blackbox", "CompositeExplicitAutograd")
def _call(handle: int, inputs: list[Tensor]) -> Tensor:
    box = _boxes[handle]
    out = box.evaluate(inputs)
    box._seen[_shapes(inputs)] = out.shape
    return out.to(_result_dtype(inputs))


def _shapes(inputs: list[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(s) for s in t.shape) for t in inputs)


def _result_dtype(inputs: list[Tensor]) -> torch.dtype:
    """That of the first floating input; float64 when there is none."""
    return next((t.dtype for t in inputs if t.is_floating_point()), torch.float64)


@torch.library.register_fake("deepzero::blackbox", lib=_library)
def _fake(handle: int, inputs: list[Tensor]) -> Tensor:
    shape = _boxes[handle]._seen[_shapes(inputs)]  # the ordinary call of the same step has been here
    return inputs[0].new_empty(shape, dtype=_result_dtype(inputs))


def blackbox(
    function: Callable[..., Any] | None = None, *, batched: bool = False, dtype: torch.dtype = torch.float64
) -> Any:
    """Wrap any Python callable for use inside a model or an objective. Also a decorator.

    function(*tensors)  receives tensors of its own, which it may write, and returns one tensor, array or number. What
                        it draws from global generators, or from generators that it closes over, is the same in every
                        query of a step
    batched             True promises that rows are independent: a stack of rows in, the stack of results out. All
                        perturbations of a block are then handed over as one call; otherwise one call each
    dtype               floating inputs are converted to it. float64 keeps differences exact; a box that computes in
                        float32 limits exactness by itself, so give it a larger mu

    A query evaluates it at base + difference and subtracts its value at the base.
    """
    if function is None:
        return lambda f: BlackBox(f, batched=batched, dtype=dtype)
    if not callable(function):
        raise TypeError(f"blackbox expects a callable, got {type(function).__name__}")
    return BlackBox(function, batched=batched, dtype=dtype)
