"""Work on many perturbations in pieces that the device has memory for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import DeviceError

log = logging.getLogger("deepzero")
Result = TypeVar("Result")


def for_one(run: Callable[[], Result], what: str) -> Result:
    """``run()``, which works on one perturbation; :class:`DeviceError` when the device has no memory for it."""
    try:
        return run()
    except torch.OutOfMemoryError as error:
        refused = _reason(error)
    raise _no_memory(what, refused)


def in_pieces(count: int, size: int, run: Callable[[int, int], Tensor], what: str) -> tuple[Tensor, int]:
    """``run(start, stop)`` over ``count`` perturbations, at most ``size`` at once and half as many when memory is out.

    Returns the results one after the other and the size that fits; :class:`DeviceError` when not even one does.
    """
    results: list[Tensor] = []
    done, fits, refused = 0, size, ""
    while done < count:
        stop = min(done + fits, count)
        try:
            results.append(run(done, stop))
        except torch.OutOfMemoryError as error:
            refused = _reason(error)
        else:
            done = stop
            continue
        # not in the except clause: the traceback holds what the attempt had allocated
        if stop - done == 1:
            raise _no_memory(what, refused)
        fits = (stop - done) // 2
    if fits < size:
        log.warning("%s: no memory for %d perturbations at once (%s); going on with %d", what, size, refused, fits)
    return results[0] if len(results) == 1 else torch.cat(results), fits


def _reason(error: torch.OutOfMemoryError) -> str:
    return (str(error).splitlines() or ["out of memory"])[0]


def _no_memory(what: str, reason: str) -> DeviceError:
    return DeviceError(
        f"{what}: the device has no memory for one perturbation ({reason}). Use a smaller batch, precision='bfloat16', "
        "or free what else lies on it."
    )
