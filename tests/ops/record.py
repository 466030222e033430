"""Writes what C++ and CUDA kernels are given and what they must give, for csrc/tests/replay.cpp and replay_cuda.cpp to
run them without torch and without a GPU.

    python tests/ops/record.py BACKEND FILE [op ...]     cpu or cuda

A call is recorded as dzkernels/<backend>/<op>.py makes it, for every case of ops/cases, in plain memory and in odd
memory where that changes what the kernel is given. Nothing runs but the reference: its result stands where the kernel
must put its own, with how far that may be off.
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
from dzkernels._op import DECLARED
from helpers import strided
from ops.case import Case
from ops.table import CASES, allowed, results

ROOT = Path(__file__).resolve().parents[2]

LARGEST = {"cpu": 1 << 20, "cuda": 1 << 18}
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


def calls(backend: str, op: str) -> Iterator[Call]:
    """What the cases of an op give to its kernel. None comes from a case that the kernel does not take, nor from one
    whose result is rounded to another dtype after the kernel."""
    kernel = DECLARED[op].kernels[backend]
    for case in CASES[op]():
        if backend in case.refused or (case.dtype != torch.float32 and case.dtype not in kernel.dtypes):
            continue
        with dzkernels.use_backend("reference"):
            wanted, *_ = results(getattr(dzkernels, op)(**case.args))
        plain = _given(backend, op, case.args)
        if plain is None:
            continue
        yield _call(op, case, *plain, wanted)
        odd = _given(backend, op, tree_map_only(Tensor, strided, case.args))
        if odd is not None and not _alike(plain[0], odd[0]):
            yield _call(op, case, *odd, wanted)


def _given(backend: str, op: str, args: dict[str, Any]) -> tuple[tuple[Any, ...], Tensor] | None:
    """What a call of the op gives to the kernel, and the result that it makes of the kernel's, not computed yet."""
    given: list[tuple[Any, ...]] = []
    with contextlib.ExitStack() as stack:
        run: Callable[..., Any]
        if DECLARED[op].kernels[backend].result:
            stack.enter_context(mock.patch.object(cpu, "kernel", lambda op: lambda *args: given.append(args)))
            run = cpu.direct(op)
        else:
            module = importlib.import_module(f"dzkernels.{backend}.{op}")
            stack.enter_context(mock.patch.object(module, "launch", lambda module, *args: given.append(args)))
            run = module.run
        stack.enter_context(mock.patch.object(backends, "implementation", lambda backend, op: run))
        stack.enter_context(mock.patch.object(backends, "choose", lambda *_, **__: backend))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda device: (8, 0)))
        result, *_ = results(getattr(dzkernels, op)(**args))
    return (given[0], result) if given and any(value is _written(result) for value in given[0]) else None


def _written(result: Tensor) -> Tensor:
    """What a result is a view of."""
    return result if result._base is None else result._base


def _alike(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Whether a kernel is given the same twice: its tensors are all contiguous then."""
    return all(
        one.stride() == other.stride() if isinstance(one, Tensor) else one == other
        for one, other in zip(some, others, strict=True)
    )


def _call(op: str, case: Case, given: tuple[Any, ...], result: Tensor, wanted: Tensor) -> Call:
    out = _written(result)
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
    return Call(op, case.id, arguments)


def sources(backend: str) -> dict[str, Path]:
    """The ops that have a kernel in csrc, with its file."""
    files = sorted((ROOT / "csrc" / backend).glob("*.c*"))
    return {path.stem: path for path in files if path.stem in dzkernels.OPS}


def size(call: Call) -> int:
    tensors = [value.wanted if isinstance(value, Output) else value.values for value in call.arguments
               if isinstance(value, Output | Memory)]  # fmt: skip
    return sum(values.numel() for values in tensors)


def main(backend: str, path: str, *ops: str) -> None:
    with Path(path).open("wb") as file:
        for op in ops or sources(backend):
            count = 0
            for call in calls(backend, op):
                if size(call) <= LARGEST[backend]:
                    call.write(file)
                    count += 1
            print(f"{op}: {count} calls")


if __name__ == "__main__":
    main(*sys.argv[1:])
