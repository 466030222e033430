"""The declaration of an op: its tensors, which every call is checked against, and its kernels.

An op is declared once, in dzkernels/ops/<op>.py. The list of ops, the exports of dzkernels, the choice of a backend and
the table in docs/gpu.md are derived from the declarations.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _check as check

Dtypes = tuple[torch.dtype, ...]

INT64: Dtypes = (torch.int64,)
FLOAT64: Dtypes = (torch.float64,)
WIDE: Dtypes = (torch.float32, torch.float64)
BFLOAT16: Dtypes = (torch.bfloat16,)

# Rules for dtypes that depend on the leading tensor: the first tensor given among those declared as LEAD. It also
# decides the backend.
LEAD = "any floating-point dtype; the others declared so have that of the first"
LIKE = "the dtype of the leading tensor"
BASE = "float64 where the leading tensor is, else float32"
BASE_OR_BFLOAT16 = "likewise, or bfloat16"


@dataclass(frozen=True)
class Arg:
    """One tensor of an op.

    name      its name in error messages
    dims      its shape: 'P, N, H, W'. A name has the same value in all tensors of a call. A dimension may also be a
              number ('P, 4') or a sum of products of names ('H, 2 D + E'); a final '*s' is any number of dimensions
    dtypes    the dtypes it may have, or one of the rules above
    optional  whether it may be None
    filled    the dimensions that must not be 0 unless P is 0: 'N, H and W'
    below     for indices: the dimension that they index
    what      for indices: what that dimension counts
    """

    name: str
    dims: str
    dtypes: Dtypes | str
    optional: bool = False
    filled: str = ""
    below: str = ""
    what: str = ""


Sizes = dict[str, int]


class _Shape:
    """The parsed dimensions of an argument."""

    def __init__(self, arg: Arg) -> None:
        self.arg = arg
        self.dims = tuple(arg.dims.split(", "))
        self.tail = ""
        if self.dims[-1].startswith("*"):
            *fixed, self.tail = self.dims
            self.dims = tuple(fixed)
        self.computed = [dim for dim in self.dims if not dim.isidentifier()]
        self.filled = re.findall(r"\b(?!and\b)\w+", arg.filled)

    @property
    def rank(self) -> tuple[bool, bool]:
        """The order of checks: optional tensors and those with computed sizes come last."""
        return self.arg.optional, any(" " in dim for dim in self.computed)

    def bind(self, op: str, tensor: Tensor, sizes: Sizes) -> None:
        for dim in self.computed:
            sizes[dim] = _value(dim, sizes)
        dims = self.dims
        if self.tail:
            more = sizes.setdefault(self.tail, tensor.dim() - len(dims))
            dims = (*dims, *(f"{self.tail}{i}" for i in range(more)))
        check.of_shape(op, self.arg.name, tensor, tuple(map(sizes.get, dims)), f"[{self.arg.dims}]")
        sizes.update(zip(dims, tensor.shape, strict=True))
        empty = "P" in dims and sizes["P"] == 0
        if not empty and not all(sizes[dim] for dim in self.filled):
            raise ValueError(
                f"dz::{op}: {self.arg.name} must be non-empty in {self.arg.filled}, got {check.shape(tensor)}"
            )


def _value(dim: str, sizes: Sizes) -> int:
    """The value of a sum of products, '2 D + E'."""
    return sum(
        math.prod(int(factor) if factor.isdigit() else sizes[factor] for factor in term.split())
        for term in dim.split(" + ")
    )


def _dtypes(arg: Arg, lead: torch.dtype) -> Dtypes:
    if isinstance(arg.dtypes, tuple):
        return arg.dtypes
    base = torch.float64 if lead is torch.float64 else torch.float32
    return {BASE: (base,), BASE_OR_BFLOAT16: (base, torch.bfloat16)}.get(arg.dtypes, (lead,))


@dataclass(frozen=True)
class Kernel:
    """A kernel of one backend, started by run() of dzkernels/<backend>/<op>.py. All of them take float32.

    dtypes        dtypes it takes besides float32
    on_request    never chosen automatically, only if its backend is requested by name: it has not been measured on a
                  GPU, and PyTorch's own op may be as fast
    with_moments  an exception to on_request: it is chosen if the call requests the moments of the next norm, which
                  PyTorch's op cannot return
    note          text for the table in docs/gpu.md
    result        for C++ kernels that dzkernels.cpu.direct calls without a file of their own: the shape of the float32
                  result, in names of dimensions: 'P, R, K'
    """

    dtypes: Dtypes = ()
    on_request: bool = False
    with_moments: bool = False
    note: str = ""
    result: str = ""


def op_of(module: str) -> str:
    """The op of a module, from the module's __name__: files are named after their op."""
    return module.rpartition(".")[2]


class Op:
    """An op: its tensors, and its kernels by the name of their backend. The reference needs no declaration."""

    def __init__(self, module: str, *args: Arg, **kernels: Kernel) -> None:
        self.name = op_of(module)
        self.args = args
        self.kernels = kernels
        self._shapes = sorted(enumerate(map(_Shape, args)), key=lambda numbered: numbered[1].rank)
        self._leads = [(at, arg.name) for at, arg in enumerate(args) if arg.dtypes is LEAD]
        self._indices = [(at, arg) for at, arg in enumerate(args) if arg.below]
        self._passed: dict[Any, Sizes] = {}
        DECLARED[self.name] = self

    def __call__(self, *tensors: Tensor | None) -> Sizes:
        """Checks `tensors` against the declaration and returns the value of every dimension name.

        They are given in the order of the declaration, None if absent. TypeError or ValueError if one does not fit.

        A combination of shapes, dtypes and devices that has passed once is not checked again; indices always are.
        """
        try:
            key = tuple([None if t is None else (t.shape, t.dtype, t.device) for t in tensors])
        except AttributeError:  # one is not a tensor
            key = None
        sizes = self._passed.get(key)
        if sizes is None:
            sizes = self._check(tensors)
            if len(self._passed) >= _MAX_PASSED:
                self._passed.clear()
            self._passed[key] = sizes
        for at, arg in self._indices:
            indices = tensors[at]
            if indices is not None:
                check.in_range(self.name, arg.name, indices, sizes[arg.below], arg.what)
        return sizes.copy()

    def _check(self, tensors: tuple[Tensor | None, ...]) -> Sizes:
        at, leading = next((lead for lead in self._leads if tensors[lead[0]] is not None), self._leads[0])
        lead = check.of_dtype(self.name, leading, tensors[at], check.FLOATS)
        sizes: Sizes = {}
        for at, shape in self._shapes:
            arg, tensor = shape.arg, tensors[at]
            if tensor is None and arg.optional:
                continue
            tensor = check.of_dtype(self.name, arg.name, tensor, _dtypes(arg, lead.dtype))
            shape.bind(self.name, tensor, sizes)
            check.same_device(self.name, arg.name, tensor, leading, lead)
        return sizes


# Maximum number of combinations of shapes that an op remembers as checked. The blocks of a plan have few.
_MAX_PASSED = 1024

# Every op by its name, once dzkernels.ops is imported.
DECLARED: dict[str, Op] = {}


def kernel(backend: str, op: str) -> Kernel | None:
    """The declaration of a kernel, None if there is no such kernel. Every op has a reference, which takes any dtype."""
    return Kernel(check.FLOATS) if backend == "reference" else DECLARED[op].kernels.get(backend)
