"""Compiles the Triton kernels for GPUs of compute capability 8.0 and 9.0, where there need be none, and prints what
each takes of one.

The calls are those of compiled() in ops/cases/<op>.py. The op's launcher runs on tensors without memory, and what it
would launch (kernel, types, constants, warps) is compiled, so that the table cannot differ from what runs. Refused:
more shared memory than a program can have, and spills in a hot kernel. Started by test_aot.py in a process of its own:

    python tests/ops/aot_triton.py [part of a call's name ...]
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # read at import; the default of Triton changes between versions

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import dzkernels
from dzkernels import OPS, backends
from ops.calls import Compiled

CAPABILITIES = (80, 90)
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program can have


CALLS = [
    (op, call)
    for op in OPS
    if backends.has_kernel("triton", op)
    for call in importlib.import_module(f"ops.cases.{op}").compiled()
]


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]

    def source(self) -> ASTSource:
        """As launched on a device: multiples of 16 and addresses are known to be such, ones are constants."""
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name] = "constexpr"
                constants[(index,)] = value
            elif isinstance(value, Tensor):
                signature[parameter.name] = "*" + _TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[parameter.name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32"
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)


_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}


def launches(op: str, call: Compiled) -> list[Launch]:
    """What the op would launch."""
    found: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        options = {name: value for name, value in kwargs.items() if name not in names}
        given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
        found.append(Launch(kernel, given, options))

    run, JITFunction.run = JITFunction.run, record
    choose, backends.choose = backends.choose, lambda *args, **more: "triton"
    try:
        getattr(dzkernels, op)(*call.args, **call.kwargs)
    finally:
        JITFunction.run, backends.choose = run, choose
    if not found:
        raise AssertionError(f"{op} ({call.what}) launches nothing")
    return found


@dataclasses.dataclass(frozen=True)
class Resources:
    registers: int
    shared: int
    spilled: int

    @classmethod
    def of(cls, compiled: Any, capability: int) -> Resources:
        with tempfile.TemporaryDirectory() as folder:
            cubin, ptx = pathlib.Path(folder, "kernel.cubin"), pathlib.Path(folder, "kernel.ptx")
            cubin.write_bytes(compiled.asm["cubin"])
            used = dict(re.findall(r"\b(REG|STACK):(\d+)", tool("cuobjdump", "--dump-resource-usage", str(cubin))))
            spilled = 0
            if used["STACK"] != "0":  # spills, or arrays
                ptx.write_text(compiled.asm["ptx"])
                arch = f"-arch=sm_{capability}{'a' if capability >= 90 else ''}"
                moved = re.findall(
                    r"(\d+) bytes spill (?:stores|loads)", tool("ptxas", "-v", arch, str(ptx), "-o", str(cubin))
                )
                assert len(moved) == 2, "ptxas does not say how much is spilled"
                spilled = sum(map(int, moved))
        return cls(int(used["REG"]), int(compiled.metadata.shared), spilled)


def tool(name: str, *args: str) -> str:
    """What a program of the Triton package prints."""
    path = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    result = subprocess.run([path, *args], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def kernels() -> dict[JITFunction, str]:
    """Every kernel of dzkernels/triton with its name: what is jitted and asks for its place in the grid."""
    found = {}
    for file in sorted(pathlib.Path(dzkernels.__file__).parent.joinpath("triton").glob("*.py")):
        module = importlib.import_module(f"dzkernels.triton.{file.stem}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.__module__ == module.__name__ and "program_id" in value.src:
                found[value] = f"{file.stem}.{name}"
    return found


def main(wanted: list[str]) -> None:
    missing = kernels()
    refused: list[str] = []
    print(f"{'op':32}{'call':24}{'kernel':16}{'sm':>4}{'warps':>6}{'registers':>10}{'shared':>8}{'spilled':>8}")
    for op, call in CALLS:
        for launch in launches(op, call):
            missing.pop(launch.kernel, None)
            if wanted and not any(part in f"{op} {call.what}" for part in wanted):
                continue
            for capability in CAPABILITIES:
                target = GPUTarget("cuda", capability, 32)
                compiled = triton.compile(launch.source(), target=target, options=launch.options)
                took = Resources.of(compiled, capability)
                row = f"{op:32}{call.what:24}{launch.kernel.__name__:16}{capability:4}"
                row += f"{compiled.metadata.num_warps:6}{took.registers:10}{took.shared:8}{took.spilled:8}"
                print(row, flush=True)
                if took.shared > SHARED[capability] or (call.hot and took.spilled > 0):
                    refused.append(row)
    unused = [op for op in OPS if backends.has_kernel("triton", op) and op not in dict(CALLS)]
    if missing or unused:
        raise SystemExit(f"no call of compiled() launches {', '.join([*missing.values(), *unused])}")
    if refused:
        raise SystemExit("spills in a hot kernel, or more shared memory than there is:\n" + "\n".join(refused))


if __name__ == "__main__":
    main(sys.argv[1:])
