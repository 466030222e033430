"""Regions of the graph that one fused kernel takes whole, found by pattern for any module.

A pattern looks only at ops, never at names. Where the carriers at run time are not the kernel's, or a parameter inside
the region moves, the generic rules run its nodes one by one: fusing changes speed, never meaning.

A pattern is a row of ``table.py``: a region (``region.py``: a dataclass of the nodes that follow one another), a launch
function of a dozen lines, and the devices that want it (``policy.py``).
"""

from .pattern import Pattern
from .region import Region
from .schedule import Step, schedule
from .table import LAUNCHES, PATTERNS, patterns_for

__all__ = ["LAUNCHES", "PATTERNS", "Pattern", "Region", "Step", "patterns_for", "schedule"]
