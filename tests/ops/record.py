"""Writes what C++ kernels are given and what they must give, for csrc/tests/replay.cpp to run them without torch.

    python tests/ops/record.py FILE [op ...]

A call is recorded as dzkernels/cpu/<op>.py makes it, for every case of ops/cases, in plain memory and in odd memory
where that changes what the kernel is given. Nothing runs but the reference: its result stands where the kernel must
put its own, with how far that may be off.
"""

from __future__ import annotations

import contextlib
import importlib
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import dzkernels
from dzkernels import backends, cpu
from dzkernels._load import native
from dzkernels._op import DECLARED
from helpers import strided
from ops.case import Case
from ops.table import CASES, allowed, results

LARGEST = 1 << 20
"""Numbers in a call: sanitizers make a kernel some thirty times slower, and more numbers take no other way."""


@dataclass
class Memory:
    """What a kernel reads: of a tensor with strides from its first element to its last one."""

    values: Tensor

    def write(self, file: BinaryIO) -> None:
        data = self.values.view(torch.uint8).numpy().tobytes()
        file.write(struct.pack("<cqq", b"m", self.values.element_size(), len(data)) + data)


@dataclass
class Output:
    """What a kernel must write: `wanted` up to `bound`, both in float64 and in the order of its memory."""

    dtype: torch.dtype
    wanted: Tensor
    bound: Tensor

    def write(self, file: BinaryIO) -> None:
        code = {torch.float32: b"f", torch.float64: b"d", torch.bfloat16: b"h"}[self.dtype]
        file.write(struct.pack("<ccq", b"o", code, self.wanted.numel()))
        for values in (self.wanted, self.bound):
            file.write(values.numpy().tobytes())


@dataclass
class Call:
    op: str
    case: str
    arguments: list[Memory | Output | int | float | None]

    def write(self, file: BinaryIO) -> None:
        for text in (self.op.encode(), self.case.encode()):
            file.write(struct.pack("<q", len(text)) + text)
        file.write(struct.pack("<q", len(self.arguments)))
        for value in self.arguments:
            if isinstance(value, Memory | Output):
                value.write(file)
            elif value is None:
                file.write(b"n")
            elif isinstance(value, float):
                file.write(struct.pack("<cd", b"d", value))
            else:
                file.write(struct.pack("<cq", b"i", int(value)))


def calls(op: str) -> Iterator[Call]:
    """What the cases of an op give to its C++ kernel. A case that another kernel runs gives none."""
    for case in CASES[op]():
        if case.dtype != torch.float32 and case.dtype not in DECLARED[op].kernels["cpu"].dtypes:
            continue
        with dzkernels.use_backend("reference"):
            wanted, *_ = results(getattr(dzkernels, op)(**case.args))
        plain = _given(op, case.args)
        if plain is None:
            continue
        yield _call(op, case, *plain, wanted)
        odd = _given(op, tree_map_only(Tensor, strided, case.args))
        if odd is not None and not _alike(plain[0], odd[0]):
            yield _call(op, case, *odd, wanted)


def _given(op: str, args: dict[str, Any]) -> tuple[tuple[Any, ...], Tensor] | None:
    """What a call of the op gives to the kernel, and the result that it makes of the kernel's, not computed yet."""
    given: list[tuple[Any, ...]] = []
    with contextlib.ExitStack() as stack:
        run: Callable[..., Any]
        if DECLARED[op].kernels["cpu"].result:
            stack.enter_context(mock.patch.object(cpu, "kernel", lambda op: lambda *args: given.append(args)))
            run = cpu.direct(op)
        else:
            module = importlib.import_module(f"dzkernels.cpu.{op}")
            stack.enter_context(mock.patch.object(module, "launch", lambda module, *args: given.append(args)))
            run = module.run
        stack.enter_context(mock.patch.object(backends, "implementation", lambda backend, op: run))
        stack.enter_context(dzkernels.use_backend("cpu"))
        result, *_ = results(getattr(dzkernels, op)(**args))
    return (given[0], result) if given else None


def _alike(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Whether a kernel is given the same twice: its tensors are all contiguous then."""
    return all(
        one.stride() == other.stride() if isinstance(one, Tensor) else one == other
        for one, other in zip(some, others, strict=True)
    )


def _call(op: str, case: Case, given: tuple[Any, ...], result: Tensor, wanted: Tensor) -> Call:
    out = result if result._base is None else result._base
    arguments: list[Memory | Output | int | float | None] = []
    for value in given:
        if value is out:
            where = (result.size(), result.stride(), result.storage_offset())
            both = []
            for values in (wanted.double(), allowed(case, wanted).expand_as(wanted)):
                holder = torch.full_like(out, torch.nan, dtype=torch.float64)
                holder.as_strided(*where).copy_(values)
                both.append(holder)
            arguments.append(Output(out.dtype, *both))
        elif isinstance(value, Tensor):
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            arguments.append(Memory(value.as_strided((last + 1 if value.numel() else 0,), (1,)).contiguous()))
        else:
            arguments.append(value)
    assert any(isinstance(value, Output) for value in arguments), f"{op}, {case.id}: the result is no kernel's"
    return Call(op, case.id, arguments)


def size(call: Call) -> int:
    tensors = [value.wanted if isinstance(value, Output) else value.values for value in call.arguments
               if isinstance(value, Output | Memory)]  # fmt: skip
    return sum(values.numel() for values in tensors)


def main(path: str, *ops: str) -> None:
    with Path(path).open("wb") as file:
        for op in ops or native().kernels():
            count = 0
            for call in calls(op):
                if size(call) <= LARGEST:
                    call.write(file)
                    count += 1
            print(f"{op}: {count} calls")


if __name__ == "__main__":
    main(*sys.argv[1:])
