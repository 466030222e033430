"""Leaving a model and the process as they were: random state, buffers, and commits that Ctrl-C cannot cut in half."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def random_state() -> tuple[Any, ...]:
    """State of every global generator that a model's forward may draw from: torch (all devices), numpy, python."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def set_random_state(state: tuple[Any, ...]) -> None:
    cpu, cuda, numpy, python = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    np.random.set_state(numpy)
    random.setstate(python)


_HELD = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back for a few short writes that must happen together; delivered right after them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    before = {number: signal.getsignal(number) for number in _HELD}
    handlers = {number: handler for number, handler in before.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: pending.append((number, frame)))
        yield
    finally:
        for number in reversed(handlers):  # SIGINT last: its handler may raise from here on
            signal.signal(number, handlers[number])
        for caught, frame in pending:
            handlers[signal.Signals(caught)](caught, frame)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch sums in other orders with other numbers of threads; inside, its bits do not depend on the caller's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def random_state_kept() -> Iterator[tuple[Any, ...]]:
    """Whatever is drawn inside, the global generators are as before afterwards."""
    state = random_state()
    try:
        yield state
    finally:
        with uninterrupted():
            set_random_state(state)


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """``model.get_parameter(name)``, which TorchScript modules do not have."""
    if isinstance(model, torch.jit.ScriptModule):
        return dict(model.named_parameters())[name]
    return model.get_parameter(name)


@contextlib.contextmanager
def model_kept(model: nn.Module) -> Iterator[list[str]]:
    """Parameters and buffer slots that the code inside writes are put back; the list names the written parameters."""
    parameters = {name: (p, p._version, p.detach().clone()) for name, p in model.named_parameters()}
    slots = [(m, dict(m._buffers)) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    written: list[str] = []
    try:
        yield written
    finally:
        with uninterrupted(), torch.no_grad():
            for name, (p, version, value) in parameters.items():
                if p._version != version:
                    written.append(name)
                    p.copy_(value)
            for module, buffers in slots:
                module._buffers.clear()
                module._buffers.update(buffers)


def cloned_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def write_buffers(model: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(values[name])
