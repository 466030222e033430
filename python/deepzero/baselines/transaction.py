"""All or nothing: weights, buffers and random state end as one of two snapshots, whatever happens in between."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..state import random_state, set_random_state

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Snapshot:
    """Buffers of a model and the random state of torch, numpy and python, as they were when it was taken."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._random = random_state()

    def restore(self) -> None:
        """Put every saved bit back; safe to repeat."""
        for module, name, buffer, saved in self._buffers:
            module._buffers[name] = buffer
            buffer.copy_(saved)
        set_random_state(self._random)


class Transaction:
    """Runs an objective many times and leaves the model as it was, or as it was after the base pass.

    Ctrl-C and SIGTERM reach the user's objective at once, but are held back while weights or buffers are being
    written, so no interrupt can land between a change and its undoing. Entering takes the snapshot; leaving by an
    exception restores it; leaving normally restores it too, unless :meth:`keep` chose a later snapshot.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._live = False
        self._pending: tuple[int, FrameType | None] | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._moved: tuple[Tensor, Any, Tensor] | None = None

    def __enter__(self) -> Transaction:
        self._hold()
        try:
            self.start = Snapshot(self._model)
        except BaseException:
            self._release()
            raise
        self._end = self.start
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.put_back()
        (self._end if error is None else self.start).restore()
        self._release()

    def keep(self, snapshot: Snapshot) -> None:
        """On a normal exit restore ``snapshot`` instead of the start."""
        self._end = snapshot

    def call(self, function: Callable[[], float]) -> float:
        """Run the user's code: the only stretch in which an interrupt may strike."""
        self.settle()
        try:
            self._live = True
            return function()
        finally:
            self._live = False

    def settle(self) -> None:
        """Let an interrupt that was held back strike now, while everything can still be undone."""
        if self._pending is not None:
            self._live = True
            self._deliver(*self._pending)
            self._live = False

    def move(self, parameter: Tensor, index: Any, value: Tensor) -> None:
        """Write one weight and remember its bits; :meth:`put_back` undoes it."""
        self._moved = (parameter, index, parameter[index].clone())
        parameter[index] = value

    def put_back(self) -> None:
        if self._moved is not None:
            parameter, index, saved = self._moved
            with torch.no_grad():
                parameter[index] = saved
            self._moved = None

    def _hold(self) -> None:
        for number in _SIGNALS:
            previous = signal.getsignal(number)
            if callable(previous):
                try:
                    signal.signal(number, self._deliver)
                except ValueError:  # not the main thread: python delivers no signals here
                    return
                self._previous[number] = previous

    def _deliver(self, number: int, frame: FrameType | None) -> None:
        if not self._live:
            self._pending = (number, frame)
            return
        self._live, self._pending = False, None
        self._previous[number](number, frame)
        self._live = True  # the caller's own handler chose to go on

    def _release(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        if self._pending is not None:
            self._previous[self._pending[0]](*self._pending)
