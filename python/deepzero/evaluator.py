"""What an estimate asks of the loss: quotients along coordinates, and differences along directions.

Two things answer: ``Captured`` in engine.py, which propagates differences through a graph, and :class:`Whole`, which
calls the objective. Estimators know this interface alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import StepError
from .graph.bound import Bound
from .objective import check_finite
from .state import set_random_state


class Evaluator(Protocol):
    """The loss of one batch near the weights, from the same random state and buffers at every query."""

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


class Whole:
    """The objective as one opaque function of the parameters, for a model that cannot be captured.

    It runs in float64 where the module allows it. Where it does not, a moved weight has to be written in the
    weight's own dtype, and the realised step fl(w + h) - w becomes the divisor.

    ``elsewhere`` holds parameter values to use instead of the model's own.
    """

    def __init__(self, bound: Bound, start: tuple[Any, ...], elsewhere: Mapping[str, Tensor] | None = None) -> None:
        self.bound = bound
        self.start = start
        self.elsewhere = elsewhere or {}
        self.double = True
        try:
            self.loss = self.evaluate({})
        except Exception:  # whatever refuses float64; what is wrong in the model's own dtype is raised below
            self.double = False
            self.loss = self.evaluate({})

    def _cast(self, value: Tensor) -> Tensor:
        value = value.detach()
        return value.double() if self.double and value.is_floating_point() else value.clone()

    def parameter(self, name: str) -> Tensor:
        """The value of a parameter that queries start from; never to be written."""
        own = self.bound.model.get_parameter(name).detach()
        value = self.elsewhere.get(name, own)
        return value.double() if self.double and value.is_floating_point() else value.to(own.dtype)

    def evaluate(self, moved: Mapping[str, Tensor]) -> float:
        """The loss with some parameters replaced."""
        set_random_state(self.start)
        model = self.bound.model
        values = {f"model.{name}": self._cast(b) for name, b in model.named_buffers()}
        for name, _ in model.named_parameters():
            values[f"model.{name}"] = moved[name] if name in moved else self.parameter(name)
        tensors = tuple(self._cast(t) for t in self.bound.tensors)
        with torch.no_grad():
            return float(torch.func.functional_call(self.bound, values, tensors))

    def move(self, name: str, where: Tensor, step: float) -> tuple[Tensor, float]:
        """The parameter with one entry moved, and the step that was realised."""
        value = self.parameter(name).clone()
        at = tuple(where.tolist())
        before = float(value[at])
        value[at] += step
        return value, float(value[at]) - before

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
                name: v if self.double else v.to(self.bound.model.get_parameter(name).dtype) for name, v in at.items()
            }
            losses.append(self.evaluate(kept) - self.loss)
        return torch.tensor(losses, dtype=torch.float64, device=device)
