"""Blocks on a device that replays: the launches of a block are recorded once and started together ever after.

A suffix is hundreds of small launches, and on a GPU starting them one by one costs more than running them. They are the
same in every block of P coordinates and in every step, so one CUDA graph for each (parameter, P) is recorded and
replayed. What changes lies in device memory at addresses that do not: the coordinates and the step in buffers of the
recording, the values of the base pass in those of the first step (:class:`HeldBase`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..base_pass import Base, Layouts, rounded
from ..carriers import Carrier, OneEntry
from ..device import Device, UnrecordableError
from ..fusion import Step
from ..graph.graph import Graph
from ..plan.route import Route
from ..rules.registry import RULES, missing_rules

log = logging.getLogger("deepzero")

RunBlock = Callable[[Base, Sequence[Step], Mapping[str, Carrier], int], Tensor]
"""``(base, steps, parameter -> difference, P)`` -> loss differences [P]; :meth:`Engine.run`."""


class HeldBase(Base):
    """Values of the base pass at addresses that stay: :meth:`refresh` writes the next step's into the same tensors."""

    def __init__(self, base: Base, where: torch.device) -> None:
        super().__init__(
            base.graph, {node: _owned(value) for node, value in base._exact.items()}, base.dtype, base.boxes
        )
        self.where = where
        self._makers: dict[tuple[fx.Node, str], Callable[[], Any]] = {}

    def saved(self, node: fx.Node, name: str, make: Callable[[], Any]) -> Any:
        self._makers.setdefault((node, name), make)
        return super().saved(node, name, make)

    def refresh(self, base: Base) -> bool:
        """Take over the values of another step. False if a form or a Python number changed: then all starts anew."""
        self.boxes = base.boxes
        if not all(self._write(old, base._exact[node]) for node, old in self._exact.items()):
            return False
        # what is saved from something saved was finished after it, so it comes after it here
        return (
            all(self._write(old, rounded(self._exact[node], self.dtype)) for node, old in self._low.items())
            and all(self._write(old, Layouts(self._exact[node], self.dtype)) for node, old in self._planes.items())
            and all(self._write(old, self._makers[key]()) for key, old in self._saved.items())
        )

    def _write(self, old: Any, new: Any) -> bool:
        """Put ``new`` where ``old`` lies. False if that is impossible, or would not reach what is recorded."""
        if isinstance(old, Tensor):
            same = isinstance(new, Tensor) and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
            if not same:
                return False
            if old.device != self.where:
                return torch.equal(old, new)  # a recording holds its value, not its address
            if any(stride == 0 and size > 1 for stride, size in zip(old.stride(), old.shape, strict=True)):
                return False
            if old is not new:
                old.copy_(new)
            return True
        if isinstance(old, Layouts):
            if not isinstance(new, Layouts):
                return False
            made = old.made
            old.take(new)
            return all(self._write(value, getattr(new, name)) for name, value in made.items())
        if isinstance(old, tuple | list):
            return (
                isinstance(new, tuple | list)
                and len(old) == len(new)
                and all(self._write(a, b) for a, b in zip(old, new, strict=True))
            )
        return type(old) is type(new) and bool(old == new)


def _owned(value: Any) -> Any:
    """A copy that shares memory with nothing: placeholders may be the model's own tensors, others views of them."""
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_owned, value)) if isinstance(value, tuple | list) else value


@dataclass(frozen=True)
class _Recording:
    """index [P, rank] int64 and step [P] are read, result [P] float64 is written by ``replay``."""

    index: Tensor
    step: Tensor
    result: Tensor
    replay: Callable[[], None]

    def fill(self, where: Tensor, step: float) -> None:
        _fill(self.index, self.step, where, step)


def _fill(index: Tensor, steps: Tensor, where: Tensor, step: float) -> None:
    """Coordinates, then the last one again up to the size of the buffer."""
    index[: len(where)] = where
    index[len(where) :] = where[-1]
    steps.fill_(step)


@dataclass
class _Known:
    """What is kept for one captured graph: base values, recordings by (parameter, P), parameters that run directly."""

    base: HeldBase
    recordings: dict[tuple[str, int], _Recording] = field(default_factory=dict)
    direct: set[str] = field(default_factory=set)


class Replayer:
    """Runs blocks of coordinates by replaying recordings of them, or without ``record`` directly: with the same bits.

    One thread at a time.
    """

    def __init__(self, device: Device, run: RunBlock) -> None:
        self.device = device
        self.record = True
        self._run = run
        self._known: dict[Graph, _Known] = {}
        self._logged: set[str] = set()

    def hold(self, base: Base, graphs: Collection[Graph]) -> HeldBase:
        """The same values where recordings read them. What belongs to none of ``graphs`` is forgotten."""
        self._known = {graph: known for graph, known in self._known.items() if graph in graphs}
        known = self._known.get(base.graph)
        if known is None or not known.base.refresh(base):
            self._known.pop(base.graph, None)
            known = self._known[base.graph] = _Known(HeldBase(base, self.device.where))
        return known.base

    def differences(self, base: Base, route: Route, where: Tensor, step: float) -> Tensor:
        """Loss differences [n] float64 when each coordinate of where [n, rank] moves by ``step``; n <= route.block.

        Blocks come in powers of two up to ``route.block``; the last coordinate fills one up. What cannot be recorded
        runs directly, in blocks of the same sizes, with one message that says why.
        """
        known = self._known[base.graph]
        size = min(1 << (len(where) - 1).bit_length(), route.block)
        key = route.parameter, size
        direct = not self.record or route.parameter in known.direct
        if key not in known.recordings and not direct:
            try:
                known.recordings[key] = self._record(known.base, route, where, step, size)
            except UnrecordableError as error:
                direct = True
                known.direct.add(route.parameter)
                self._say(f"blocks of {route.parameter!r} are launched one op at a time and not replayed: {error}")
        if direct:
            index, steps = _buffers(base, where, size)
            _fill(index, steps, where, step)
            return self._direct(base, route, index, steps)[: len(where)]
        recording = known.recordings[key]
        recording.fill(where, step)
        recording.replay()
        return recording.result[: len(where)].clone()  # the next recording may work in the same memory

    def _direct(self, base: Base, route: Route, index: Tensor, steps: Tensor) -> Tensor:
        return self._run(base, route.steps, {route.parameter: OneEntry(route.shape, index, steps)}, len(index))

    def _record(self, base: HeldBase, route: Route, where: Tensor, step: float, size: int) -> _Recording:
        reason = unrecordable(route)
        if reason:
            raise UnrecordableError(reason)
        index, steps = _buffers(base, where, size)
        _fill(index, steps, where, step)

        def run() -> Tensor:
            return self._direct(base, route, index, steps)

        self.device.warm_up(run)
        return _Recording(index, steps, *self.device.record(run))

    def _say(self, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            log.warning(text)


def _buffers(base: Base, where: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return where.new_empty((size, where.shape[1])), torch.empty(size, dtype=base.dtype, device=where.device)


def unrecordable(route: Route) -> str:
    """Why no recording of the route is tried, or "": Python that runs in every block would run only once."""
    if any(node.target in RULES and RULES[node.target].family == "opaque" for node in route.suffix):
        return "a black box is called on the way"
    missing = missing_rules(route.suffix)
    return f"no rule for {', '.join(missing)}" if missing else ""
