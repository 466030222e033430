"""What an estimate asks of the loss: quotients along coordinates, and differences along directions.

Two things answer: ``Captured`` in engine.py, which propagates differences through a graph, and :class:`Whole`, which
calls the objective. Estimators know this interface alone.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import ObjectiveError, StepError
from .graph.bound import Bound
from .objective import check_finite
from .state import parameter_of, set_random_state
from .surroundings import Surroundings


class Evaluator(Protocol):
    """The loss of one batch near the weights, from the same random state and buffers at every query."""

    def reaches(self, names: Sequence[str]) -> bool:
        """Whether the loss may depend on any of these parameters."""

    def check_step(self, name: str, where: Tensor, step: float) -> None:
        """Raise :class:`StepError` where a step is lost at any of the coordinates [n, rank] of a parameter."""

    def coordinates(
        self, name: str, where: Tensor, mu: float, signs: Sequence[float]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(coordinates [P, rank], quotients [P] float64) of one parameter, in the order of ``where`` [n, rank]."""

    def directions_at_once(self, names: Sequence[str], at_most: int) -> int:
        """How many directions that move all of ``names`` fit into memory together."""

    def along(self, moved: Mapping[str, Tensor]) -> Tensor:
        """Loss differences [P] float64 when each parameter moves by its P steps [P, *shape]."""


def quotient(differences: Sequence[Tensor], mu: float) -> Tensor:
    """Quotients from the loss differences of a forward scheme's one step, or of a central scheme's two."""
    if len(differences) == 1:
        return differences[0] / mu
    forward, backward = differences
    return (forward - backward) / (2 * mu)


class OwnDraws(TorchDispatchMode):
    """Random numbers are drawn in ``dtype``, the model's own, though it runs in float64: those of the ordinary call."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if func is torch.ops.aten.native_dropout.default:
            scale, keep = func(torch.ones_like(args[0], dtype=self.dtype), *args[1:], **kwargs)
            return args[0] * scale.double(), keep
        own, named = pytree.tree_map(self._narrow, (args, kwargs))
        drawn = func(*own, **named)
        if func._schema.is_mutable:  # x.normal_() and rand(out=x): the draw belongs into x itself
            return kwargs.get("out", args[0] if args else None).copy_(drawn)
        return pytree.tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.dtype is self.dtype else t, drawn)

    def _narrow(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.dtype is torch.float64 else value


class Whole:
    """The objective as one opaque function of the parameters, for a model that cannot be captured.

    It runs in float64 where the module allows it. Where it does not, a moved weight has to be written in the
    weight's own dtype, and the realised step fl(w + h) - w becomes the divisor.

    ``elsewhere`` holds parameter values to use instead of the model's own.
    """

    def __init__(
        self,
        bound: Bound,
        start: tuple[Any, ...],
        surroundings: Surroundings,
        elsewhere: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.bound = bound
        self.start = start
        self.surroundings = surroundings
        self.elsewhere = elsewhere or {}
        self.double = True
        try:
            self.loss = self.evaluate({})
        except Exception:  # whatever refuses float64; what is wrong in the model's own dtype is raised below
            self.double = False
            self.loss = self.evaluate({})
        again = self.evaluate({})
        if again != self.loss:
            raise ObjectiveError(
                f"two calls with the same batch, weights, random state and attributes give {self.loss:.9g} and "
                f"{again:.9g}, so their difference says nothing of the weights. Something that deepzero cannot put "
                "back changes from call to call: a generator, an iterator or a counter in other code. Pass it in "
                "through the batch, or seed it inside the objective."
            )

    def _cast(self, value: Tensor) -> Tensor:
        """A copy, which the call may write."""
        value = value.detach()
        double = self.double and value.is_floating_point()
        return value.to(torch.float64 if double else value.dtype, copy=True)

    def parameter(self, name: str) -> Tensor:
        """A copy of the value of a parameter that queries start from."""
        own = parameter_of(self.bound.model, name).detach()
        value = self.elsewhere.get(name, own)
        double = self.double and value.is_floating_point()
        return value.to(torch.float64 if double else own.dtype, copy=True)

    def evaluate(self, moved: Mapping[str, Tensor]) -> float:
        """The loss with some parameters replaced."""
        set_random_state(self.start)
        self.surroundings.restore()
        model = self.bound.model
        values = {f"model.{name}": self._cast(b) for name, b in model.named_buffers()}
        for name, value in itertools.chain(self.bound.others.named_parameters(), self.bound.others.named_buffers()):
            values[f"others.{name}"] = self._cast(value)
        for name, _ in model.named_parameters():
            values[f"model.{name}"] = moved[name] if name in moved else self.parameter(name)
        tensors = tuple(self._cast(t) for t in self.bound.tensors)
        draws = OwnDraws(self._own_dtype()) if self.double else contextlib.nullcontext()
        with torch.no_grad(), draws:
            return float(self.bound.call(values, tensors))

    def _own_dtype(self) -> torch.dtype:
        """What the model itself draws in: the least precise floating dtype of its parameters."""
        dtypes = {p.dtype for p in self.bound.model.parameters() if p.is_floating_point()}
        return max(dtypes or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)

    def move(self, name: str, where: Tensor, step: float) -> tuple[Tensor, float]:
        """The parameter with one entry moved, and the step that was realised."""
        value = self.parameter(name)
        at = tuple(where.tolist())
        before = float(value[at])
        value[at] += step
        return value, float(value[at]) - before

    def reaches(self, names: Sequence[str]) -> bool:
        return True

    def check_step(self, name: str, where: Tensor, step: float) -> None:
        if self.double:
            return
        parameter = self.parameter(name)
        values = parameter[tuple(where.unbind(1))] if where.shape[1] else parameter.reshape(1)
        lost = int(((values + step) == values).sum())
        if lost:
            raise StepError(
                f"step {step:g} vanishes on {lost:,} of {len(values):,} selected weights of {name!r} "
                f"({parameter.dtype}), which have to be written because the model runs whole. Use a larger mu, or "
                "keep the weights in float32."
            )

    def coordinates(
        self, name: str, where: Tensor, mu: float, signs: Sequence[float]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One coordinate at a time; a quotient's divisor is the realised step."""
        for row in where:
            moved = [self.move(name, row, sign * mu) for sign in signs]
            losses = [self.evaluate({name: value}) for value, _ in moved]
            if len(signs) == 1:
                value = (losses[0] - self.loss) / moved[0][1]
            else:
                value = (losses[0] - losses[1]) / (moved[0][1] - moved[1][1])
            check_finite(value, f"with {name}{row.tolist()} moved by {mu:g}")
            yield row[None], torch.tensor([value], dtype=torch.float64, device=where.device)

    def directions_at_once(self, names: Sequence[str], at_most: int) -> int:
        return 1

    def along(self, moved: Mapping[str, Tensor]) -> Tensor:
        count, device = next((len(steps), steps.device) for steps in moved.values())
        losses = []
        for p in range(count):
            at = {name: self.parameter(name) + steps[p] for name, steps in moved.items()}
            kept = {
                name: v if self.double else v.to(parameter_of(self.bound.model, name).dtype) for name, v in at.items()
            }
            losses.append(self.evaluate(kept) - self.loss)
        return torch.tensor(losses, dtype=torch.float64, device=device)
