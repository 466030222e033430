"""From a batch to loss differences: base loss, captured graph, float64 base pass, blocks.

Everything here is transactional. The model is only ever read; its buffers are cloned before the one ordinary forward
call and the clones handed back, so that an exception or Ctrl-C at any point leaves nothing to undo.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from .base_pass import Base, interpret, settle_sizes
from .carriers import Carrier, Dense, OneEntry
from .device import Device, device_for
from .errors import CaptureError, DeviceError, ObjectiveError, users_level
from .evaluator import Evaluator, Whole, quotient
from .execute.pieces import in_pieces
from .execute.planner import Planner
from .execute.replay import Replayer
from .execute.run_block import run_block
from .fusion import Step
from .graph.bound import Bound
from .graph.cache import Cache
from .graph.graph import Graph
from .objective import Mask, Objective, check_finite, check_loss, check_parameters, selected
from .plan.memory import budget
from .plan.route import reach
from .state import (
    cloned_buffers,
    model_kept,
    one_thread,
    parameter_of,
    random_state,
    random_state_kept,
    set_random_state,
    uninterrupted,
)
from .surroundings import CLONED, BoxState, Left, Surroundings

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.float32, torch.bfloat16),
    "float64": (torch.float64, torch.float64),
}
"""precision -> dtype of differences, dtype of the operands of convolutions and matrix products."""


@dataclass
class Prepared:
    """One batch, ready for queries.

    loss      of the ordinary forward call
    evaluator answers queries: :class:`Captured`, or ``Whole`` for a model that cannot be captured
    reason    why it cannot, or ""
    buffers   what the ordinary forward call left in the buffers
    random    what it left in the random generators
    left      what it left elsewhere, in attributes and in what the objective closes over
    capture_seconds  spent tracing, 0 when the graph was known
    """

    loss: float
    evaluator: Evaluator
    reason: str
    buffers: dict[str, Tensor]
    random: tuple[Any, ...]
    left: Left
    capture_seconds: float

    @property
    def base(self) -> Base | None:
        """The float64 base pass; None for a model that runs whole."""
        return self.evaluator.base if isinstance(self.evaluator, Captured) else None


class Engine:
    """Evaluates loss differences of one model and objective."""

    def __init__(
        self, model: nn.Module, objective: Objective, *, precision: str, strict: bool, block: int | None
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
        if block is not None and (not isinstance(block, int) or block < 1):
            raise ValueError(f"block must be a positive number of perturbations or None, got {block!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(objective):
            raise TypeError(f"objective must be callable as objective(model, batch), got {type(objective).__name__}")
        self.model = model
        self.objective = objective
        self.precision = precision
        self.dtype, self.operands = PRECISIONS[precision]
        self.strict = strict
        self.block = block
        self.cache = Cache()
        self.planner = Planner(model, self.dtype, self.operands, block)
        self._warned: set[str] = set()
        self._elsewhere: dict[str, Tensor] = {}
        self._device: Device | None = None
        self.replayer: Replayer | None = None

    @contextmanager
    def at(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the named parameters have these values (shape and device of the parameter, any floating dtype).

        The model itself keeps its own: only estimates see the values, and the base pass sees them unrounded.
        """
        self._elsewhere = {name: value.detach() for name, value in values.items()}
        try:
            yield
        finally:
            self._elsewhere = {}

    # --- the start of every estimate

    def initialise(self, batch: Any) -> None:
        """Lazy parameters get their shapes and values from one ordinary call, as they would in a training loop."""
        if any(isinstance(p, UninitializedParameter) for p in self.model.parameters()):
            with torch.no_grad():
                self.objective(self.model, batch)

    @contextmanager
    def prepared(self, batch: Any) -> Iterator[Prepared]:
        """Run the base loss and the base pass; the global random state is back as it was on exit."""
        self._settle()
        with torch.inference_mode(False), random_state_kept() as start:
            surroundings = Surroundings(self.model, self.objective)
            bound = Bound(self.model, self.objective, batch, surroundings.others)
            try:
                yield self._prepare(bound, surroundings, start)
            finally:
                with uninterrupted():
                    surroundings.restore()

    def _prepare(self, bound: Bound, surroundings: Surroundings, start: tuple[Any, ...]) -> Prepared:
        buffers = cloned_buffers(self.model)
        named = {f"model.{name}": value for name, value in buffers.items()}
        for name, value in self._elsewhere.items():
            named[f"model.{name}"] = value.to(parameter_of(self.model, name).dtype)
        with torch.no_grad(), one_thread(), model_kept(self.model) as written:
            try:
                result = bound.call(named, bound.copies())
            except RuntimeError as error:
                _check_places(bound, error)
                raise
        if written:
            raise ObjectiveError(
                f"the forward pass writes the parameter {written[0]!r} in place (nn.Embedding with max_norm does), "
                "so the loss is no function of the weights. Apply such a step to the weights after the optimizer's."
            )
        if lost := surroundings.lost():
            raise ObjectiveError(
                f"a call changes {lost[0]}, a tensor of more than {CLONED >> 20} MiB that is neither a parameter nor a "
                "buffer of the model, so no query could start from the same state. Make it a buffer of the model."
            )
        loss = check_loss(result)
        after, left = random_state(), surroundings.taken()
        surroundings.restore()
        moved = {name: named[f"model.{name}"] for name in buffers}
        began = time.perf_counter()
        known = bound in self.cache
        graph, reason = self.cache.get(bound)
        surroundings.restore()
        if graph is None:
            whole = self._run_whole(bound, start, reason, surroundings)
            return Prepared(loss, whole, reason, moved, after, left, 0.0)
        base = self._base_pass(bound, graph, loss, start, surroundings, known=known)
        if self.replayer is not None:
            base = self.replayer.hold(base, self.cache.graphs())
        seconds = 0.0 if known else time.perf_counter() - began
        return Prepared(loss, Captured(self, base), "", moved, after, left, seconds)

    def _settle(self) -> None:
        """See where the parameters lie and what that device can do; a model on several devices is not replayed."""
        places = {p.device for p in self.model.parameters()}
        where = places.pop() if len(places) == 1 else torch.device("cpu")
        if self._device is None or self._device.where != where:
            self._device, self.replayer = device_for(where), None
            self.planner.device = self._device
        if self._device is None:
            return
        if self.operands is torch.bfloat16 and not self._device.bfloat16():
            raise DeviceError(
                f"precision='bfloat16' needs a device that multiplies in bfloat16, and {where} does not. "
                "Use precision='float32'."
            )
        if self.replayer is None:
            self.replayer = Replayer(self._device, self.run)
        self.replayer.record = os.environ.get("DZ_REPLAY") != "0"

    def budget(self) -> int:
        """Bytes that the differences of one block may take."""
        return budget(self._device)

    def _inputs(self, bound: Bound, graph: Graph) -> dict[fx.Node, Any]:
        parameters, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        inputs: dict[fx.Node, Any] = {
            n: self._elsewhere.get(name, parameters[name].detach()) for n, name in graph.parameters.items()
        }
        inputs |= {n: buffers[name] for n, name in graph.buffers.items()}
        inputs |= graph.constants
        inputs |= dict(zip(graph.batch, bound.tensors, strict=True))
        return inputs

    def _base_pass(
        self,
        bound: Bound,
        graph: Graph,
        loss: float,
        start: tuple[Any, ...],
        surroundings: Surroundings,
        *,
        known: bool,
    ) -> Base:
        """The float64 base pass, checked against the ordinary forward call; one recapture when they disagree."""
        for attempt in range(2):
            set_random_state(start)
            with one_thread():
                boxes: dict[fx.Node, BoxState] = {}
                values = interpret(graph, self._inputs(bound, graph), exact=True, boxes=boxes)
            settle_sizes(graph, values)
            base = Base(graph, values, self.dtype, boxes)
            # a graph from the cache must match closely; one captured a moment ago may differ by its own rounding
            least, single = torch.finfo(_loss_dtype(graph)).eps, torch.finfo(torch.float32).eps
            close = max(2 * least, 64 * single) * abs(loss)
            tolerance = 64 * least * max(1.0, abs(loss)) if attempt or not known else close
            if abs(base.loss - loss) <= tolerance:
                return base
            # a network with thresholds may truly differ in float64: ask the graph in the model's own precision
            set_random_state(start)
            again = float(interpret(graph, self._inputs(bound, graph), exact=False)[graph.loss])
            if abs(again - loss) <= tolerance:
                return base
            if attempt == 0:
                fresh, reason = self.cache.get(bound, fresh=True)
                surroundings.restore()
                if fresh is None:
                    raise CaptureError(f"the model could be captured before and cannot be now: {reason}")
                graph = fresh
        raise ObjectiveError(
            f"the captured graph gives a loss of {again:.9g} and the objective itself {loss:.9g} with the same batch, "
            "weights and random state. An estimate would describe another function. Something in the model or the "
            "objective changes from call to call (a Python counter, a global, a generator of its own, in-place edits "
            "of a closed-over tensor): pass it in through the batch, or make it a buffer."
        )

    def _run_whole(self, bound: Bound, start: tuple[Any, ...], reason: str, surroundings: Surroundings) -> Whole:
        if self.strict:
            raise CaptureError(f"strict=True, and the model cannot be captured: {reason}")
        self.warn_once(
            f"the model cannot be captured as a graph and runs whole, one full forward pass a query: {reason}"
        )
        return Whole(bound, start, surroundings, self._elsewhere)

    def warn_once(self, text: str) -> None:
        """Warn at the line of the user's own code that is running."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=users_level())

    def selected(self, mask: Mask | None) -> dict[str, Tensor]:
        """Parameter name -> [n, rank] int64 coordinates in order. Raises :class:`MaskError` before any work."""
        check_parameters(self.model)
        return {name: chosen.nonzero() for name, chosen in selected(self.model, mask).items()}

    # --- queries

    def run(
        self, base: Base, steps: Sequence[Step], moved: Mapping[str, Carrier], count: int, observe: Any = None
    ) -> Tensor:
        """Loss differences [P] float64 when the named parameters move as given."""
        seeds = {node: c for name, c in moved.items() for node in base.graph.placeholders(name)}
        return run_block(
            base, steps, seeds, count, operands=self.operands, strict=self.strict, warned=self._warned, observe=observe
        )


class Captured:
    """Answers queries by propagating differences through the captured graph, from one base pass."""

    def __init__(self, engine: Engine, base: Base) -> None:
        self.engine = engine
        self.base = base

    def reaches(self, names: Sequence[str]) -> bool:
        graph = self.base.graph
        return bool(reach(graph, names)) or any(graph.loss in graph.placeholders(name) for name in names)

    def check_step(self, name: str, where: Tensor, step: float) -> None:
        """No step is lost: weights are never written."""

    def differences(self, name: str, where: Tensor, step: float) -> Tensor:
        """Loss differences [n] float64 when each coordinate of where [n, rank] of one parameter moves by ``step``.

        Blocks get smaller, for good, when the device has no memory for one; :class:`DeviceError` when none is left.
        """
        engine, base = self.engine, self.base
        route = engine.planner.route(base, name)

        def run(start: int, stop: int) -> Tensor:
            part = where[start:stop]
            if engine.replayer is not None:
                return engine.replayer.differences(base, route, part, step)
            steps = torch.full((len(part),), step, dtype=engine.dtype, device=part.device)
            return engine.run(base, route.steps, {name: OneEntry(route.shape, part, steps)}, len(part))

        losses, fits = in_pieces(len(where), route.block, run, f"blocks of {name!r}")
        if fits < route.block:
            engine.planner.keep_block(base.graph, name, fits)
        return losses

    def coordinates(
        self, name: str, where: Tensor, mu: float, signs: Sequence[float]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Block by block."""
        graph = self.base.graph
        route = self.engine.planner.route(self.base, name)
        # the step a difference starts from is mu rounded to the query dtype; divide by that very number
        realised = float(torch.tensor(mu, dtype=self.engine.dtype))
        for part in where.split(route.block):
            if not route.suffix and graph.loss not in graph.placeholders(name):
                yield part, torch.zeros(len(part), dtype=torch.float64, device=part.device)
                continue
            quotients = quotient([self.differences(name, part, sign * mu) for sign in signs], mu) * (mu / realised)
            if not bool(quotients.isfinite().all()):
                worst = int((~quotients.isfinite()).nonzero()[0, 0])
                check_finite(float(quotients[worst]), f"with {name}{part[worst].tolist()} moved by {mu:g}")
            yield part, quotients

    def directions_at_once(self, names: Sequence[str], at_most: int) -> int:
        engine = self.engine
        if engine.block is not None or at_most == 1:
            return engine.block or 1
        weights = 4 * sum(parameter_of(engine.model, name).numel() for name in names)
        need = 3 * weights + engine.planner.joint_bytes(self.base, names)
        return max(1, min(at_most, engine.budget() // need))

    def along(self, moved: Mapping[str, Tensor]) -> Tensor:
        steps = self.engine.planner.joint_steps(self.base.graph, list(moved))
        seeds = {name: Dense(values) for name, values in moved.items()}
        return self.engine.run(self.base, steps, seeds, len(next(iter(moved.values()))))


def _check_places(bound: Bound, error: RuntimeError) -> None:
    """Raise :class:`DeviceError` if the forward pass failed with model and batch on different devices."""
    model = {str(t.device) for t in (*bound.model.parameters(), *bound.model.buffers())}
    batch = {str(t.device) for t in bound.tensors}
    if len(model | batch) > 1 and not isinstance(error, torch.OutOfMemoryError):
        raise DeviceError(
            f"the forward pass failed with the model on {', '.join(sorted(model)) or 'no device'} and the batch on "
            f"{', '.join(sorted(batch)) or 'no device'}: {error}. Move both to one device with .to(device)."
        ) from error


def _loss_dtype(graph: Graph) -> torch.dtype:
    """The least precise floating dtype that the model itself computes in."""
    dtypes = {
        value.dtype
        for node in graph.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor) and value.is_floating_point()
    }
    return max(dtypes or {torch.float32}, key=lambda d: torch.finfo(d).eps)
