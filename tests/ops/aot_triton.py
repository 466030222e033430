"""Compiles the Triton kernels for GPUs of compute capability 8.0 and 9.0, where there need be none, and prints what
each takes of one.

A row of CALLS is a call of an op. Its launcher runs on tensors without memory, and what it would launch (kernel, types,
constants, warps) is compiled, so that the table cannot differ from what runs. Refused: more shared memory than a
program can have, and spills in a hot kernel. Started by test_aot.py in a process of its own:

    python tests/ops/aot_triton.py [part of a row's name ...]
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

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import dzkernels
from dzkernels import OPS, backends

CAPABILITIES = (80, 90)
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program can have
BF16, F64 = torch.bfloat16, torch.float64


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an op; `hot` where its speed matters, which is most calls."""

    op: str
    what: str
    args: tuple[Tensor | None, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    hot: bool = True


def convolution(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """P, N, C, H, W, O: a 3 x 3 convolution's differences in one input channel, and its weight."""
    count, samples, channels, height, width, rows = shape
    return (
        empty(count, samples, height, width, dtype=dtype),
        indices(count),
        empty(rows, channels, 3, 3, dtype=dtype),
    )


def normed(*shape: int, dtype: torch.dtype = torch.float32, pool: int = 1) -> dict[str, Any]:
    """P, N, C, H, W: what channel_batch_norm and dense_batch_norm need besides the differences."""
    base = shape[1:]
    args = {"var": empty(shape[2], dtype=F64), "gamma": empty(shape[2]), "relu": True, "y": empty(*base)}
    return args | ({"pool": pool, "gap": empty(*base)} if pool > 1 else {})


def last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[P, N, C, H, W] with the channels last in memory."""
    count, samples, channels, height, width = shape
    return empty(count, samples, height, width, channels, dtype=dtype).permute(0, 1, 4, 2, 3)


def rows(count: int, size: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """What layer_norm_difference takes."""
    return empty(count, size, width, dtype=dtype), empty(size, width), empty(size, dtype=F64), empty(width)


def norm_of(size: int, width: int) -> dzkernels.RowNorm:
    return dzkernels.RowNorm(empty(size, width), empty(size, dtype=F64), empty(width), 1e-5)


def attention(
    count: int, samples: int, heads: int, size: int, width: int, dtype: torch.dtype, moves: str = "qkv"
) -> tuple[Tensor | None, ...]:
    """Self-attention whose q, k and v come from one projection."""
    base = empty(samples, size, 3, heads, width).unbind(2)
    moved = empty(count, samples, size, 3, heads, width, dtype=dtype).unbind(3)
    deltas = [d.transpose(2, 3) if name in moves else None for name, d in zip("qkv", moved, strict=True)]
    return (*deltas, *(x.transpose(1, 2) for x in base), empty(samples, heads, size, size))


def moments(shape: tuple[int, ...]) -> Tensor:
    """Of differences of this shape, as the convolution before left them."""
    return empty(shape[0], 2, shape[2], dtype=F64)


RESNET = (96, 128, 16, 32, 32)  # P, N, C, H, W of the first stage of ResNet-20
STAGE_3 = (96, 128, 64, 8, 8)
ONES = (1, 1, 1, 1, 1)
X = empty(*RESNET[1:])

# In rows called "ones" every size is 1, which a launch hands over as a constant.
CALLS = [
    *(
        Call("conv2d_tap", name, (X.to(dtype), indices(96, 4), empty(96, dtype=dtype)), TAP)
        for name, dtype in (("f32", torch.float32), ("bf16", BF16))
        for TAP in ({"kernel": 3, "padding": 1, "out_channels": 16},)
    ),
    Call("conv2d_tap", "ones", (empty(1, 1, 1, 1), indices(1, 4), empty(1)), {"kernel": 1, "out_channels": 1}, False),
    Call("channel_conv2d", "f32", convolution(*RESNET, 16), {"padding": 1}),
    Call("channel_conv2d", "bf16", convolution(*RESNET, 16, dtype=BF16), {"padding": 1}),
    Call("channel_conv2d", "ones", convolution(*ONES, 1), {"padding": 1}, False),
    *(
        Call(
            "channel_batch_norm",
            name,
            (empty(*shape[:2], *shape[3:]), indices(shape[0]), empty(*shape[1:])),
            {"mean": empty(shape[2], dtype=F64), **normed(*shape, pool=pool)},
            hot,
        )
        for name, shape, pool, hot in (("", RESNET, 1, True), ("pool 2", RESNET, 2, True), ("ones", ONES, 1, False))
    ),
    *(
        Call(
            "dense_batch_norm",
            name,
            (last(*shape, dtype=dtype), empty(*shape[1:])),
            {"residual": last(*shape, dtype=dtype), "out_dtype": dtype, **normed(*shape, pool=pool)},
            hot,
        )
        for name, shape, pool, dtype, hot in (
            ("f32", RESNET, 1, torch.float32, True),
            ("bf16", RESNET, 1, BF16, True),
            ("pool 2 bf16", RESNET, 2, BF16, True),
            ("ones", ONES, 1, torch.float32, False),
        )
    ),
    *(
        Call(
            "batch_norm_conv2d",
            name,
            (last(*shape, dtype=dtype), empty(*shape[1:])),
            {"weight": empty(shape[2], shape[2], 3, 3, dtype=dtype), "padding": 1, **normed(*shape), **more},
            hot,
        )
        for name, shape, dtype, hot, more in (
            ("C 64 bf16", STAGE_3, BF16, True, {"next_zc": empty(*STAGE_3[1:]), "moments": moments(STAGE_3)}),
            ("C 64 f32", STAGE_3, torch.float32, True, {"next_zc": empty(*STAGE_3[1:]), "moments": moments(STAGE_3)}),
            ("C 16 bf16", RESNET, BF16, True, {"next_zc": empty(*RESNET[1:]), "moments": moments(RESNET)}),
            ("C 16 bf16 alone", RESNET, BF16, True, {}),
            ("C 64 residual bf16", STAGE_3, BF16, True, {"residual": last(*STAGE_3, dtype=BF16)}),
            ("ones", ONES, torch.float32, False, {"next_zc": empty(1, 1, 1, 1)}),
        )
    ),
    *(
        Call(
            "dense_conv2d",
            name,
            (last(*shape, dtype=dtype), empty(shape[2], shape[2], 3, 3, dtype=dtype)),
            {"padding": 1, "next_zc": next_zc},
            hot,
        )
        for name, shape, dtype, hot, next_zc in (
            ("C 64 bf16", STAGE_3, BF16, True, empty(*STAGE_3[1:])),
            ("C 64 f32", STAGE_3, torch.float32, True, empty(*STAGE_3[1:])),
            ("C 16 bf16", RESNET, BF16, True, empty(*RESNET[1:])),
            ("C 64 bf16 alone", STAGE_3, BF16, True, None),
            ("ones", ONES, torch.float32, False, None),
        )
    ),
    *(
        Call(
            "channel_linear_cross_entropy",
            f"K {classes}",
            (
                empty(count, samples),
                indices(count),
                empty(classes, width),
                empty(samples, classes, dtype=F64),
                indices(samples),
            ),
            {},
            count > 1,
        )
        for count, samples, classes, width in ((96, 128, 10, 64), (96, 128, 1000, 512), (1, 1, 1, 1))
    ),
    *(
        Call(
            "cross_entropy_difference",
            f"K {classes}",
            (
                empty(samples, classes, dtype=F64),
                indices(samples),
                empty(count, samples, classes),
            ),
            {},
            count > 1,
        )
        for count, samples, classes in ((96, 128, 10), (96, 128, 1000), (1, 1, 1))
    ),
    Call("gelu_difference", "erf bf16", (empty(32, 64, 3072, dtype=BF16), empty(64, 3072))),
    Call("gelu_difference", "tanh f32", (empty(32, 64, 3072), empty(64, 3072)), {"approximate": "tanh"}),
    Call("gelu_difference", "ones", (empty(1, 1), empty(1)), {}, False),
    Call("layer_norm_difference", "M 768 bf16", rows(32, 4096, 768, BF16), {"eps": 1e-5}),
    Call("layer_norm_difference", "M 768 f32", rows(32, 4096, 768), {"eps": 1e-5}),
    Call("layer_norm_difference", "M 128 f32", rows(32, 4096, 128), {"eps": 1e-5}),
    Call("layer_norm_difference", "M 50000 f32", rows(32, 64, 50000), {"eps": 1e-5, "centre": False}),
    Call("layer_norm_difference", "ones", rows(1, 1, 1), {"eps": 1e-5}, False),
    Call("softmax_difference", "K 128", (empty(32, 4096, 128), empty(4096, 128))),
    Call("softmax_difference", "K 1000 log", (empty(32, 4096, 1000), empty(4096, 1000)), {"log": True}),
    Call("softmax_difference", "K 50272 log", (empty(32, 512, 50272), empty(512, 50272)), {"log": True}),
    Call("softmax_difference", "ones", (empty(1, 1, 1), empty(1, 1)), {}, False),
    Call("attention_difference", "T 128 f32", attention(8, 8, 12, 128, 64, torch.float32), {"scale": 0.125}),
    Call("attention_difference", "T 1024 bf16", attention(8, 8, 12, 1024, 64, BF16), {"scale": 0.125}),
    Call("attention_difference", "T 128 dv bf16", attention(8, 8, 12, 128, 64, BF16, "v"), {"scale": 0.125}),
    Call("attention_difference", "ones", attention(1, 1, 1, 1, 1, torch.float32), {"scale": 1.0}, False),
    *(
        Call(
            "linear_difference",
            name,
            (empty(count, size, width, dtype=dtype), empty(outs, width)),
            {
                "norm": norm_of(size, width) if "norm" in name else None,
                "residual": None if "norm" in name else empty(count, size, outs),
                "out_dtype": dtype if "norm" in name else torch.float32,
            },
            count > 1,
        )
        for name, count, size, width, outs, dtype in (
            ("96 to 288 norm bf16", 32, 1024, 96, 288, BF16),
            ("128 to 384 norm f32", 32, 1024, 128, 384, torch.float32),
            ("768 residual bf16", 8, 1024, 768, 768, BF16),
            ("ones norm", 1, 1, 1, 1, torch.float32),
        )
    ),
    *(
        Call(
            "mlp_difference",
            name,
            (
                empty(count, size, width, dtype=dtype),
                empty(hidden, width),
                empty(size, hidden),
                empty(width, hidden),
                empty(count, size, width),
                norm_of(size, width),
            ),
            {"approximate": "tanh" if "tanh" in name else "none", "operands": dtype, "out_dtype": torch.float32},
            count > 1,
        )
        for name, count, size, width, hidden, dtype in (
            ("96 bf16", 32, 1024, 96, 384, BF16),
            ("96 tanh bf16", 32, 1024, 96, 384, BF16),
            ("256 bf16", 32, 1024, 256, 1024, BF16),
            ("128 f32", 32, 1024, 128, 512, torch.float32),
            ("ones", 1, 1, 1, 1, torch.float32),
        )
    ),
    Call(
        "self_attention_difference",
        "96 norm residual bf16",
        (
            empty(32, 16 * 64, 96),
            empty(3, 96, 96),
            *(empty(16, 3, 64, 32) for _ in "qkv"),
            empty(16, 3, 64, 64),
            empty(96, 96),
            empty(32, 16 * 64, 96),
            norm_of(16 * 64, 96),
        ),
        {"scale": 32**-0.5, "operands": BF16},
    ),
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


_TYPES = {torch.float32: "fp32", torch.float64: "fp64", BF16: "bf16", torch.float16: "fp16", torch.int64: "i64"}


def launches(call: Call) -> list[Launch]:
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
        getattr(dzkernels, call.op)(*call.args, **call.kwargs)
    finally:
        JITFunction.run, backends.choose = run, choose
    if not found:
        raise AssertionError(f"{call.op} ({call.what}) launches nothing")
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
    for call in CALLS:
        for launch in launches(call):
            missing.pop(launch.kernel, None)
            if wanted and not any(part in f"{call.op} {call.what}" for part in wanted):
                continue
            for capability in CAPABILITIES:
                target = GPUTarget("cuda", capability, 32)
                compiled = triton.compile(launch.source(), target=target, options=launch.options)
                took = Resources.of(compiled, capability)
                row = f"{call.op:32}{call.what:24}{launch.kernel.__name__:16}{capability:4}"
                row += f"{compiled.metadata.num_warps:6}{took.registers:10}{took.shared:8}{took.spilled:8}"
                print(row, flush=True)
                if took.shared > SHARED[capability] or (call.hot and took.spilled > 0):
                    refused.append(row)
    unused = [op for op in OPS if backends.has_kernel("triton", op) and op not in {call.op for call in CALLS}]
    if missing or unused:
        raise SystemExit(f"no row of CALLS launches {', '.join([*missing.values(), *unused])}")
    if refused:
        raise SystemExit("spills in a hot kernel, or more shared memory than there is:\n" + "\n".join(refused))


if __name__ == "__main__":
    main(sys.argv[1:])
