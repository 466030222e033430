"""A row of the table of patterns."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..carriers import Carrier, Zero
from .region import Region

if TYPE_CHECKING:
    from ..block import Block


def _everywhere(device: torch.device, dtype: torch.dtype) -> bool:
    return True


@dataclass(frozen=True)
class Pattern:
    """What one kernel takes over, and how it is launched.

    name      of the row
    region    what it looks for
    launch    ``(block, region)`` -> the difference of the region's last node; None where the kernel does not take what
              moves in this block, and the step's parts or the generic rules take over
    wanted    ``(device, dtype of differences)`` -> whether plans for that device look for it
    encloses  the region holds smaller ones; where it does not fit, they run
    """

    name: str
    region: type[Region]
    launch: Callable[[Block, Any], Carrier | None]
    wanted: Callable[[torch.device, torch.dtype], bool] = _everywhere
    encloses: bool = False

    def match(self, node: fx.Node, inside: Collection[fx.Node]) -> Region | None:
        return self.region.at(node, inside)


def constant(block: Block, *args: Any) -> bool:
    """Whether none of the arguments moves in this block; what is no node never does."""
    return all(block.raw(arg) is Zero for arg in args)
