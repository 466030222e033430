"""The ops: one file and one function each, with its contract and its kernels. Files of the same stem in
dzkernels/<backend> implement exactly this.

P is the number of perturbations propagated at once, N the number of samples. A difference is the exact change of a
value, in the units of that value. Any P, 0 included; inputs may have any strides.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

OPS = tuple(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))

FUNCTIONS: dict[str, Callable[..., Any]] = {op: getattr(importlib.import_module(f"{__name__}.{op}"), op) for op in OPS}
