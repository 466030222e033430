"""Ctrl-C and SIGTERM as a request to stop, so that a run ends between two steps and not inside one."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """The first signal asks to stop after the step at hand; a second one abandons that step.

    A step is only abandoned while ``abandonable`` is set, which is while an estimator runs: estimators undo what an
    interrupt finds half done, an optimizer's step does not.
    """

    def __init__(self) -> None:
        self.requested = False
        self.abandonable = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            name = signal.Signals(number).name
            sys.stderr.write(f"\n{name}: stopping after this step; once more to abandon the step\n")
        elif self.abandonable:
            raise KeyboardInterrupt
