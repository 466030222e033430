"""How many perturbations a block may have: what one takes, by the probe, and what there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .probe import Ran

if TYPE_CHECKING:
    from ..device import Device

CPU_BUDGET = 24 << 20
"""Bytes that the differences of one block may take on a CPU: they should stay near the caches."""

DEVICE_FRACTION = 0.5
"""Of the free memory of another device. The rest is for the next base pass, temporaries and what is saved for rules."""

MAX_BLOCK = 1024
"""Perturbations of a block at most: enough to hide the cost of a call, few enough to keep small values in cache."""


def budget(device: Device | None) -> int:
    """Bytes that the differences of one block may take; None is a CPU."""
    return CPU_BUDGET if device is None else int(DEVICE_FRACTION * device.free())


def peak_bytes(ran: Sequence[Ran]) -> int:
    """Bytes that one perturbation takes at most: differences alive at once, and a temporary as large as a result."""
    return max((step.alive + step.bytes for step in ran), default=0)


def block_size(peak: int, device: Device | None) -> int:
    """Perturbations of a block, each of which takes ``peak`` bytes.

    Off the CPU that is a power of two, which does not follow every little change of the free memory.
    """
    fits = max(1, min(budget(device) // max(peak, 1), MAX_BLOCK))
    return fits if device is None else 1 << (fits.bit_length() - 1)
