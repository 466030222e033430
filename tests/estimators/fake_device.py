"""A device that replays, made of CPU tensors: it tapes the ops of a block and plays them again on the same tensors.

Only what it reads at playback can change a result, as with a CUDA graph: Python does not run again, a number is what it
was, a tensor is found where it lay. It wants the reference kernels, whose ops it sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepzero.device import UnrecordableError

aten = torch.ops.aten

WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default)


class Tape(TorchDispatchMode):
    """Every op of the block with its tensors; an op for which a host has to wait is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            raise UnrecordableError(f"it waits for the device ({func})")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


class FakeDevice:
    """log  "warm up", "record", "play", in order; ``memory`` bytes are free."""

    def __init__(self, *, memory: int = 1 << 30, bfloat16: bool = True) -> None:
        self.where = torch.device("cpu")
        self.memory = memory
        self.has_bfloat16 = bfloat16
        self.log: list[str] = []

    def free(self) -> int:
        return self.memory

    def bfloat16(self) -> bool:
        return self.has_bfloat16

    def warm_up(self, function: Callable[[], Tensor]) -> None:
        self.log.append("warm up")
        function()
        with Tape():
            function()

    def record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.log.append("record")
        with Tape() as tape:
            result = function()

        def play() -> None:
            self.log.append("play")
            tape.play()

        return result, play
