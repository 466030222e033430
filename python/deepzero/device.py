"""Devices with memory and a queue of their own: what the engine asks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class UnrecordableError(Exception):
    """A block cannot be recorded; the message says why."""


class Device(Protocol):
    """What the engine asks of a device with memory and a queue of its own."""

    where: torch.device

    def free(self) -> int:
        """Bytes that new tensors could take now."""

    def bfloat16(self) -> bool:
        """Whether it multiplies in bfloat16."""

    def warm_up(self, function: Callable[[], Tensor]) -> None:
        """Run it so that all is made that is made once. Raises :class:`UnrecordableError` if the host has to wait."""

    def record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Record one run: its result, and what runs the same work again into the same result."""


class CudaDevice:
    """A CUDA device. All its recordings work in one pool of memory, since no two run at the same time."""

    def __init__(self, where: torch.device) -> None:
        self.where = where
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def free(self) -> int:
        """What the driver has, and what torch's allocator holds without using it."""
        unused = torch.cuda.memory_reserved(self.where) - torch.cuda.memory_allocated(self.where)
        return int(torch.cuda.mem_get_info(self.where)[0]) + unused

    def bfloat16(self) -> bool:
        with torch.cuda.device(self.where):
            return torch.cuda.is_bf16_supported(including_emulation=False)

    def warm_up(self, function: Callable[[], Tensor]) -> None:
        """Twice on the stream of recordings: compiling and choosing algorithms may wait, the second run may not.

        A failed recording leaves torch's allocator in disorder, so waiting is found out before.
        """
        with torch.cuda.device(self.where):
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                function()
                mode = torch.cuda.get_sync_debug_mode()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    function()
                except RuntimeError as error:
                    if "synchronizing" not in str(error):
                        raise
                    raise UnrecordableError(f"it waits for the device ({_first_line(error)})") from error
                finally:
                    torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        with torch.cuda.device(self.where):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    result = function()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise UnrecordableError(_first_line(error)) from error
        return result, graph.replay


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def device_for(where: torch.device) -> Device | None:
    """The device of tensors that lie there; None for a CPU, which has nothing to replay."""
    return CudaDevice(where) if where.type == "cuda" else None
