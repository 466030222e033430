"""The ops: one file and one function each, with the contract of the op and the list of its kernels. The files of the
same name in dzkernels/<backend> implement exactly this contract.

P      number of perturbations propagated at once; may be 0
N      number of samples
delta  a difference: the change of a value, not divided by the step, in the units of the value
u      the unit roundoff of the arithmetic, half an ulp of 1: 2^-24 in float32, 2^-53 in float64, 2^-8 in bfloat16.
       "6 u |x|" bounds an error by six roundings of numbers of size |x|

Inputs may have any strides.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

OPS = tuple(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))

FUNCTIONS: dict[str, Callable[..., Any]] = {op: getattr(importlib.import_module(f"{__name__}.{op}"), op) for op in OPS}
