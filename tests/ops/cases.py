"""The table of kernel cases: one function per op. The same rows run in Triton's interpreter (interpret_triton.py) and,
with the larger ones, on a GPU (test_gpu.py)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import dzkernels
from dzkernels import backends
from dzkernels._norm import moments
from helpers import UNIT, assert_bounded, assert_exact, integers, normal, small_ints, strided
from ops import (
    test_attention_difference,
    test_batch_norm_conv2d,
    test_channel_batch_norm,
    test_channel_linear_cross_entropy,
    test_cross_entropy_difference,
    test_dense_batch_norm,
    test_dense_conv2d,
    test_gelu_difference,
    test_layer_norm_difference,
    test_linear_difference,
    test_mlp_difference,
    test_self_attention_difference,
    test_softmax_difference,
)
from ops.rows import norm_of

# Triton's interpreter truncates to bfloat16 where a GPU rounds to nearest: an error of up to a whole last place.
HALF = UNIT[torch.bfloat16] * (2 if os.environ.get("TRITON_INTERPRET") == "1" else 1)


@dataclass(frozen=True)
class Case:
    """Keyword arguments of the op on the CPU, and how far a kernel may be from the reference.

    bound   broadcasts over the result; one rounding to the dtype of the result is added, for the reference rounds too;
            None: bit for bit
    dtype   of the differences: a kernel that does not take it must say so
    large   too slow for the interpreter
    refused backends that must say that they do not take this, though they have a kernel
    nan     NaN is wanted wherever the reference has it, and nowhere else
    """

    id: str
    args: dict[str, Any]
    bound: Tensor | float | None = None
    dtype: torch.dtype = torch.float32
    large: bool = False
    nan: bool = False
    refused: tuple[str, ...] = ()


CASES: dict[str, Callable[[], Iterator[Case]]] = {}


def cases(function: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
    """Register the cases of the op that the function is named after."""
    CASES[function.__name__] = function
    return function


def check(op: str, case: Case, backend: str, device: str) -> None:
    """`backend` on `device` against the reference on the CPU; in odd memory it gives the same bits again.

    Moments, where they are asked for, against those of the very result that they came with.
    """

    def run(args: dict[str, Any]) -> tuple[Tensor, ...]:
        moved = tree_map_only(Tensor, lambda values: values.to(device), args)
        with dzkernels.use_backend(backend):
            return tuple(t.cpu() for t in _results(getattr(dzkernels, op)(**moved)))

    if backend in case.refused or backends._refusal(backend, op, torch.device(device), case.dtype) is not None:
        assert backend in case.refused or case.dtype != torch.float32, f"{backend} refuses {op}"
        try:
            run(case.args)
        except dzkernels.BackendError:
            return
        raise AssertionError(f"{backend} has no {case.dtype} kernel for {op}, but ran it")
    with dzkernels.use_backend("reference"):
        wanted, *_ = _results(getattr(dzkernels, op)(**case.args))
    got, *left = run(case.args)
    for values in left:
        assert_bounded(values, *test_dense_conv2d.moments_by_rerun(got, case.args["next_zc"]))
    assert _layout(got) == _layout(wanted), f"strides: got {got.stride()}, wanted {wanted.stride()}"
    if case.nan:
        assert wanted.isnan().any() and torch.equal(got.isnan(), wanted.isnan()), "NaN in other places"
        got, wanted = got.nan_to_num(0), wanted.nan_to_num(0)
    if case.bound is None:
        assert_exact(got, wanted)
    else:
        assert got.dtype == wanted.dtype, f"dtype: got {got.dtype}, wanted {wanted.dtype}"
        unit = HALF if wanted.dtype == torch.bfloat16 else UNIT[wanted.dtype]
        assert_bounded(got, wanted, case.bound + 2 * unit * wanted.double().abs())
    odd, *again = run(tree_map_only(Tensor, strided, case.args))
    odd = odd.nan_to_num(0) if case.nan else odd
    for one, other in zip([odd, *again], [got, *left], strict=True):
        assert_exact(one, other)


def _results(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)


def _layout(values: Tensor) -> list[int]:
    """Strides where they matter."""
    return [stride for stride, size in zip(values.stride(), values.shape, strict=True) if size > 1 and values.numel()]


# N, Cin, H, W, O, kernel, stride, padding, dilation, groups
CONVOLUTIONS = [
    ("plain", (2, 3, 8, 8, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1)),
    ("one image, one channel", (1, 1, 5, 7, 1, (3, 3), (1, 1), (0, 0), (1, 1), 1)),
    ("stride, groups", (2, 4, 11, 10, 6, (3, 2), (3, 2), (1, 0), (1, 1), 2)),
    ("dilation, depthwise", (1, 6, 9, 8, 6, (3, 3), (2, 1), (2, 3), (2, 3), 6)),
    ("70 channels", (1, 2, 4, 30, 70, (1, 1), (1, 1), (0, 0), (1, 1), 1)),
    ("large", (2, 5, 33, 70, 70, (3, 3), (1, 1), (1, 1), (1, 1), 1)),
    # weights that do not fit into shared memory
    ("large, 600 channels", (1, 2, 12, 12, 600, (7, 7), (1, 1), (3, 3), (1, 1), 1)),
]


def _geometries() -> Iterator[tuple[str, int, torch.dtype, tuple[int, int, int, int, int, Any], dict[str, Any]]]:
    for name, (samples, channels, height, width, rows, kernel, *spacing) in CONVOLUTIONS:
        geometry = dict(zip(("stride", "padding", "dilation", "groups"), spacing, strict=True))
        for count in (0, 1, 2):
            for dtype in ((torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16))[count]:
                yield f"{name}, P={count}", count, dtype, (samples, channels, height, width, rows, kernel), geometry


@cases
def conv2d_tap() -> Iterator[Case]:
    for name, count, dtype, (samples, channels, height, width, rows, kernel), geometry in _geometries():
        sizes = (rows, channels // geometry["groups"], *kernel)
        coord = torch.stack([integers([count], size, seed=k) for k, size in enumerate(sizes)], 1)
        x = small_ints(samples, channels, height, width, seed=1, dtype=dtype)
        args = {"x": x, "coord": coord, "step": torch.full((count,), 0.5, dtype=dtype), "kernel": kernel}
        args |= {"out_channels": rows, **geometry}
        yield Case(name, args, dtype=dtype, large="large" in name)
        if count == 2:
            moved = {"x": normal(*x.shape, seed=1).to(dtype), "step": normal(count, seed=2).to(dtype)}
            bound = None if dtype == torch.float32 else 0.0  # one rounding, which the interpreter may do otherwise
            yield Case(f"{name}, any values", args | moved, bound, dtype, "large" in name)


@cases
def channel_conv2d() -> Iterator[Case]:
    for name, count, dtype, (samples, channels, height, width, rows, kernel), geometry in _geometries():
        args = {
            "delta": small_ints(count, samples, height, width, seed=2, low=-1, high=1, dtype=dtype),
            "channel": integers([count], channels, seed=3),
            "weight": small_ints(rows, channels // geometry["groups"], *kernel, seed=4, low=-2, high=2, dtype=dtype),
            **geometry,
        }
        for out_dtype in (torch.float32, torch.bfloat16) if count == 2 else (dtype,):
            yield Case(f"{name}, out {out_dtype}", args | {"out_dtype": out_dtype}, None, dtype, "large" in name)


@cases
def dense_conv2d() -> Iterator[Case]:
    # PyTorch on a CPU sums a single channel in an order that depends on its strides
    rows = [(row.id, row.values[0]) for row in test_dense_conv2d.SHAPES if row.values[0][1] > 1]
    for k, (name, shape) in enumerate([*rows, *TENSOR_CORES]):
        large, refused = name in LARGE_CONVOLUTIONS or k >= len(rows), () if _for_tensor_cores(shape) else ("cuda",)
        for count, dtype in ((2, torch.float32), (1, torch.bfloat16), (0, torch.float32))[: 3 if k == 0 else 2]:
            delta, weight = (t.to(dtype) for t in test_dense_conv2d.operands(shape, normal, count))
            args = {"delta": delta, "weight": weight, **test_dense_conv2d.geometry(shape)}
            wide = (delta.float(), weight.float(), shape)
            bound = 2 * test_dense_conv2d.roundings(*wide) if count else 0.0  # the reference rounds too
            yield Case(f"{name}, P={count}, {dtype}", args, bound, dtype, large, refused=refused)
            if k % 2 == count % 2:
                args = args | {"next_zc": test_dense_conv2d.centred(*test_dense_conv2d.by_torch(*wide).shape[1:])}
                yield Case(f"{name}, P={count}, {dtype}, moments", args, bound, dtype, large, refused=refused)
    for name, shape in TENSOR_CORES:
        delta, weight = (t.bfloat16() for t in test_dense_conv2d.operands(shape, small_ints, 1))
        args = {"delta": delta, "weight": weight, **test_dense_conv2d.geometry(shape)}
        yield Case(f"{name}, small integers", args, None, torch.bfloat16, large=True)


TENSOR_CORES = [
    ("several tiles", (5, 64, 8, 8, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1)),
    ("two tiles side by side", (1, 48, 4, 70, 32, (3, 3), (2, 1), (0, 2), (1, 1), 1)),
    ("many images of a pixel", (90, 16, 1, 1, 128, (3, 3), (1, 1), (1, 1), (1, 1), 1)),
    ("an odd size, stride 2", (3, 32, 9, 7, 48, (3, 3), (2, 2), (1, 1), (1, 1), 1)),
    ("ResNet-20, stage 1", (17, 16, 32, 32, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1)),
    ("ResNet-20, stage 2", (17, 16, 32, 32, 32, (3, 3), (2, 2), (1, 1), (1, 1), 1)),
    ("ResNet-20, stage 3", (130, 64, 8, 8, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1)),
]


def _for_tensor_cores(shape: tuple[Any, ...]) -> bool:
    """Whether dzkernels/cuda/dense_conv2d.py takes it."""
    _, channels, _, _, outs, kernel, stride, _, dilation, groups = shape
    plain = kernel == (3, 3) and dilation == (1, 1) and groups == 1 and max(stride) <= 2
    return plain and channels % 16 == 0 and outs % 16 == 0


LARGE_CONVOLUTIONS = ("chunks across perturbations", "an image of several chunks")
LARGE_CONVOLUTION = ((3, 17, 70, 9, 8), (130, 3, 3), (1, 1, 1))

# Almost nothing of the spread is left but s' >= sqrt(eps), and of two terms that cancel: 8 roundings of gamma |z| / s'.
_VANISHING = 8 * UNIT[torch.float32] / math.sqrt(1e-5)


@cases
def channel_batch_norm() -> Iterator[Case]:
    shapes = [(2, 4, 3, 8, 8), (2, 1, 1, 5, 7), (3, 9, 4, 1, 1), (0, 2, 2, 6, 5), (1, 15, 2, 24, 24)]
    for shape in [*shapes, (5, 37, 6, 32, 33)]:
        for pool in (1, 2, 3) if min(shape[3:]) > 2 else (1,):
            for relu, training in ((True, True), (False, True), (True, False))[: 1 if pool == 3 else 3]:
                args = test_channel_batch_norm.inputs(shape, 0.1, pool)
                bound = test_channel_batch_norm.by_rerun(args, relu, training)[1] if shape[0] else 0.0
                name = f"{shape}, pool={pool}, relu={relu}, training={training}"
                yield Case(name, args | {"relu": relu, "training": training}, bound, large=shape[1] == 37)
    args = test_channel_batch_norm.inputs((2, 4, 2, 8, 8))
    z = args["x"].transpose(0, 1)[args["channel"]]
    args["delta"] = z * (2.0**-12 - 1)
    largest = (args["gamma"].double()[args["channel"]].abs() * z.double().abs().amax((1, 2, 3)))[:, None, None, None]
    yield Case("a vanishing variance", args, _VANISHING * largest)
    args = test_channel_batch_norm.inputs((2, 4, 2, 8, 8), 1.0, 2) | {"relu": True}
    planes = {name: args[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("x", "y", "gap")}
    yield Case("planes", args | planes, test_channel_batch_norm.by_rerun(args, True)[1])
    far = args | {"delta": args["delta"] + 1e5}
    yield Case("a large mean", far, test_channel_batch_norm.by_rerun(far, True)[1])
    args["delta"][1, 0, 0, 0] = math.nan
    yield Case("NaN", args, test_channel_batch_norm.by_rerun(args, True)[1].nan_to_num(0), nan=True)


@cases
def dense_batch_norm() -> Iterator[Case]:
    shapes = [(3, 4, 18, 8, 8), (2, 1, 1, 5, 7), (1, 3, 33, 5, 7), (2, 9, 3, 1, 1), (0, 2, 2, 6, 5), (2, 7, 16, 9, 10)]
    variants = ((True, True), (False, True), (True, False))
    residuals = (None, "dense", "bfloat16", "channel")
    for shape in [*shapes, (2, 19, 70, 12, 17)]:
        for pool in (1, 2, 3) if min(shape[3:]) > 2 else (1,):
            for k, (relu, training) in enumerate(variants[: 3 // pool]):
                args = test_dense_batch_norm.inputs(shape, 0.1, pool)
                residual = residuals[(k + pool) % 4]
                if residual == "channel":
                    args["residual"] = normal(shape[0], shape[1], *shape[3:], seed=6)
                    args["residual_channel"] = integers([shape[0]], shape[2], seed=7)
                elif residual is not None:
                    args["residual"] = test_dense_batch_norm.last(normal(*shape, seed=6))
                    if residual == "bfloat16":
                        args["residual"] = args["residual"].bfloat16()
                dtype = torch.bfloat16 if k % 2 else torch.float32
                args["delta"] = args["delta"].to(dtype)
                bound = test_dense_batch_norm.by_rerun(args, relu, training)[1] if shape[0] else 0.0
                args |= {"relu": relu, "training": training, "out_dtype": torch.bfloat16 if k > 1 else torch.float32}
                if k == 1:
                    args["moments"] = moments(args["delta"], args["zc"])
                name = f"{shape}, pool={pool}, relu={relu}, training={training}, residual={residual}"
                yield Case(name, args, bound, dtype, shape[1] == 19)
    args = test_dense_batch_norm.inputs((2, 4, 6, 8, 8))
    args["delta"] = test_dense_batch_norm.last((args["zc"] * (2.0**-12 - 1)).expand(2, -1, -1, -1, -1))
    largest = (args["gamma"].double().abs() * args["zc"].double().abs().amax((0, 2, 3)))[:, None, None]
    yield Case("a vanishing variance", args, _VANISHING * largest)
    args = args | {"moments": moments(args["delta"], args["zc"])}
    yield Case("a vanishing variance, moments", args, _VANISHING * largest)
    args = test_dense_batch_norm.inputs((2, 2, 18, 4, 4), 1.0, 2) | {"relu": True}
    far = args | {"delta": args["delta"] + 1e5}
    yield Case("a large mean", far, test_dense_batch_norm.by_rerun(far, True, True)[1])
    args["delta"][1, 0, 3, 1, 1] = math.nan
    yield Case("NaN", args, test_dense_batch_norm.by_rerun(args, True, True)[1].nan_to_num(0), nan=True)


@cases
def batch_norm_conv2d() -> Iterator[Case]:
    shapes = [(row.id, row.values[0]) for row in test_batch_norm_conv2d.SHAPES]
    for name, shape in [*shapes, ("P=0", ((0, 2, 3, 5, 6), *shapes[0][1][1:])), ("large", LARGE_CONVOLUTION)]:
        for k, residual in enumerate((None, "dense", "channel")):
            dtype, relu, training = (torch.float32, torch.bfloat16)[k % 2], k != 1, k != 2
            args, sizes = test_batch_norm_conv2d.inputs(shape, 0.1, dtype), shape[0]
            if residual == "channel":
                args["residual"] = normal(sizes[0], sizes[1], *sizes[3:], seed=6)
                args["residual_channel"] = integers([sizes[0]], sizes[2], seed=7)
            elif residual is not None:
                args["residual"] = normal(*sizes, seed=6).to(dtype)
            bound = 2 * test_batch_norm_conv2d.by_rerun(args, relu, training, HALF)[1] if sizes[0] else 0.0
            args |= {"relu": relu, "training": training}
            if residual is not None:
                wanted = test_batch_norm_conv2d.convolved(args["delta"].float(), args, args["weight"].float())
                args["next_zc"] = test_dense_conv2d.centred(*wanted.shape[1:])
            if training and residual is not None:
                args["moments"] = moments(args["delta"], args["zc"])
            yield Case(f"{name}, residual={residual}", args, bound, dtype, name == "large")


@cases
def cross_entropy_difference() -> Iterator[Case]:
    for shape in ((3, 5, 10), (2, 1, 2), (1, 3, 37), (2, 7, 1), (0, 2, 3), (2, 300, 10), (1, 3, 2100), (2, 300, 1000)):
        for scale in (1e-6, 0.1, 30.0, 1e30):
            log_probs, target, dlogits = test_cross_entropy_difference.inputs(*shape, scale)
            e = dlogits.double() - dlogits.double().gather(2, target.expand(shape[0], -1).unsqueeze(2))
            size = (log_probs.exp() * e.abs()).sum(2).mean(1) + (scale >= 0.1) * e.abs().amax(2).mean(1)
            args = {"log_probs": log_probs, "target": target, "dlogits": dlogits}
            yield Case(f"{shape}, scale={scale}", args, 64 * UNIT[torch.float64] * size, large=shape[1:] == (300, 1000))
    log_probs = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    dlogits = torch.tensor([[[0.0, 5.0]], [[math.nan, 0.0]], [[0.0, math.nan]]])
    args = {"log_probs": log_probs, "target": torch.tensor([0]), "dlogits": dlogits}
    yield Case("an impossible class, NaN", args, nan=True)
    log_probs = torch.tensor([[-700.0, 0.0]], dtype=torch.float64)
    dlogits = torch.tensor([[[60.0, 0.0]], [[800.0, 0.0]]])  # the sum of p expm1(e) is almost -1
    args = {"log_probs": log_probs, "target": torch.tensor([0]), "dlogits": dlogits}
    yield Case("a target that had no chance", args, 8 * UNIT[torch.float64] * 800)


@cases
def channel_linear_cross_entropy() -> Iterator[Case]:
    for shape in ((5, 16, 10, 7), (1, 1, 2, 1), (2, 9, 33, 4), (2, 7, 1, 3), (0, 2, 3, 4), (2, 300, 1000, 64)):
        for scale in (1e-6, 0.1, 30.0, 1e30):
            args = test_channel_linear_cross_entropy.inputs(*shape, scale)
            products = args["delta"].double().unsqueeze(2) * args["weight"].double().t()[args["channel"]].unsqueeze(1)
            # the reference subtracts rounded products
            bound = 64 * UNIT[torch.float64] * products.abs().amax(2).mean(1)
            yield Case(f"{shape}, scale={scale}", args, bound, large=shape[1] == 300)


# dtype of the differences, out_dtype
_HALVES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
)


@cases
def gelu_difference() -> Iterator[Case]:
    for approximate in ("none", "tanh"):
        z = torch.cat([test_gelu_difference.SPECIAL, torch.linspace(-16, 16, 501)])
        steps = torch.tensor([1e-30, 1e-8, 0.125, 0.2499, 0.25, 0.2501, 0.5, 2.0, 20.0])
        delta = torch.cat([steps, -steps])[:, None].expand(-1, z.numel())
        args = {"delta": delta, "z": z, "approximate": approximate}
        yield Case(f"a sweep, {approximate}", args, test_gelu_difference.bound(delta))
        delta = normal(3, 40, seed=1)
        delta[1, 9] = math.nan
        args = {"delta": delta, "z": normal(40, seed=2), "approximate": approximate}
        yield Case(f"NaN, {approximate}", args, test_gelu_difference.bound(delta).nan_to_num(0), nan=True)
        for k, shape in enumerate([(1, 1), (5, 4, 97), (17, 260), (0, 3), (2, 0), (40, 70000)]):
            dtype, out_dtype = _HALVES[k % 4]
            delta = (normal(*shape, seed=1) * (3.0, 0.1)[k % 2]).to(dtype)
            args = {"delta": delta, "z": 2 * normal(*shape[1:], seed=2), "approximate": approximate}
            args["out_dtype"] = out_dtype
            bound = test_gelu_difference.bound(delta)
            yield Case(f"{shape}, {approximate}, {dtype} to {out_dtype}", args, bound, dtype, shape[0] == 40)


@cases
def layer_norm_difference() -> Iterator[Case]:
    for k, shape in enumerate([(17, 2, 16), *test_layer_norm_difference.SHAPES, (0, 2, 3), (3, 300, 768)]):
        for scale, centre in ((1e-8, True), (1.0, False), (0.3, True)):
            args = test_layer_norm_difference.inputs(shape, scale, centre)
            dtype, out_dtype = _HALVES[(k + centre) % 4]
            args |= {"delta": args["delta"].to(dtype), "out_dtype": out_dtype}
            if k % 3 == 0:
                args["gamma"] = None
            bound = 16 * UNIT[torch.float32] * test_layer_norm_difference.size(args)
            name = f"{shape}, scale={scale}, centre={centre}, {dtype} to {out_dtype}"
            yield Case(name, args, bound, dtype, shape[1] == 300)
    args = test_layer_norm_difference.inputs((2, 4, 96), 1.0)
    args["delta"] = (args["zc"] * (2.0**-12 - 1)).expand(2, -1, -1).contiguous()
    bound = (16 + 4 * 2.0**12) * UNIT[torch.float32] * test_layer_norm_difference.size(args)
    yield Case("a vanishing variance", args, bound)
    args = test_layer_norm_difference.inputs((3, 3, 20), 1.0)
    args["delta"][1, 2, 7] = math.nan
    bound = (16 * UNIT[torch.float32] * test_layer_norm_difference.size(args)).nan_to_num(0)
    yield Case("NaN", args, bound, nan=True)


@cases
def softmax_difference() -> Iterator[Case]:
    for k, shape in enumerate([(9, 2, 16), *test_softmax_difference.SHAPES, (0, 2, 3), (5, 300, 1000)]):
        for scale, log in ((1e-8, k % 2 == 0), (0.3, k % 2 == 1), (60.0, k % 2 == 0)):
            delta, p = test_softmax_difference.inputs(shape, scale)
            bound = test_softmax_difference.bound(delta, p, log) + 2.0**-148
            large = shape[1] == 300 or (shape[2] > 100 and scale > 1)
            yield Case(f"{shape}, scale={scale}, log={log}", {"delta": delta, "p": p, "log": log}, bound, large=large)
    delta, p = test_softmax_difference.inputs((1, 1, 600), 60.0)
    yield Case("far, two blocks", {"delta": delta, "p": p}, test_softmax_difference.bound(delta, p, False) + 2.0**-148)
    p = torch.tensor([[math.exp(-100), 1.0, 0.0]])
    for move in (20.0, 60.0, 120.0):
        delta = torch.tensor([[[move, 0.0, 1e30]], [[0.0, -move, -1e30]]])
        bound = test_softmax_difference.bound(delta, p, False) + 2.0**-148
        yield Case(f"no chance, and impossible, move={move}", {"delta": delta, "p": p}, bound)
    delta, p = test_softmax_difference.inputs((2, 3, 20), 1.0)
    delta[1, 2, 7] = math.nan
    bound = test_softmax_difference.bound(delta, p, False).nan_to_num(0)
    yield Case("NaN", {"delta": delta, "p": p}, bound, nan=True)


@cases
def attention_difference() -> Iterator[Case]:
    first, small, heads, wide, tall = test_attention_difference.SHAPES
    more, huge = (2, (1, 2), 9, 40, 40, 130), (4, (3, 4), 150, 197, 64, 64)
    everything, steps = "dq dk dv", (1e-8, 0.1, 30.0)
    for k, (shape, step, moved) in enumerate(
        [(shape, step, everything) for shape in (small, first, huge) for step in steps]
        + [(shape, step, everything) for shape in (wide, tall) for step in (1e-8, 0.1)]
        + [(small, 1.0, moved) for moved in ("dq", "dk", "dv", "dq dk", "dk dv")]
        + [(heads, 0.1, everything), (more, 0.03, everything), (more, 0.03, "dv")]
    ):
        dtype, out_dtype = _HALVES[k % 4]
        causal = bool(k % 3)
        args = test_attention_difference.inputs(shape, step, causal, tuple(moved.split()), dtype)
        name = f"{shape}, step={step}, causal={causal}, {moved}, {dtype} to {out_dtype}"
        bound = test_attention_difference.bound(args, sums=16)
        yield Case(name, args | {"out_dtype": out_dtype}, bound, dtype, shape == huge)
    args = test_attention_difference.inputs((2, (3,), 5, 37, 8, 16), 0.1)
    args["p"][:, :, 20:] = 0
    args["p"] /= args["p"].sum(-1, keepdim=True)
    bound = test_attention_difference.bound(args, sums=16)
    args["dk"][:, :, 20:] = 1e30
    yield Case("masked keys have no say", args, bound)
    args = test_attention_difference.inputs((1, (1,), 3, 5, 4, 6), 1.0, moves=("dk",))
    args["dk"] = torch.zeros_like(args["dk"])
    args["dk"][:, :, 2] = 1e4
    yield Case("all to one key", args | {"q": args["q"].abs() + 1}, 64 * UNIT[torch.float32])


# Rows of 300 are too long to be held.
_ROWS = [(2, 9, 96, 70), (3, 40, 33, 17), (1, 1, 1, 1), (5, 7, 20, 140), (20, 5, 64, 16), (2, 3, 300, 20)]


@cases
def linear_difference() -> Iterator[Case]:
    for k, (p, r, width, outs) in enumerate([*_ROWS, (9, 150, 192, 300), (3, 70, 768, 500), (0, 2, 3, 4)]):
        for normed, residual, (dtype, out_dtype) in (
            (True, None, _HALVES[k % 4]),
            (k % 2 == 0, (torch.float32, torch.bfloat16)[k % 2], _HALVES[(k + 1) % 4]),
        ):
            args = test_linear_difference.case(p, r, width, outs, (0.01, 3.0)[k % 2])
            args["delta"] = args["delta"].to(dtype)
            args["residual"] = None if residual is None else args["residual"].to(residual)
            if normed:
                norm = norm_of(r, width)
                args["norm"] = norm._replace(gamma=None) if k % 3 == 1 else norm
            operands = (torch.float32, torch.bfloat16)[k // 2 % 2] if normed else dtype
            bound = test_linear_difference.bound(args, HALF if operands == torch.bfloat16 else 0.0, tensor_cores=True)
            args |= {"operands": operands, "out_dtype": out_dtype}
            name = f"{(p, r, width, outs)}, norm={normed}, residual={residual}, {dtype} by {operands} to {out_dtype}"
            yield Case(name, args, bound, dtype, r > 40)
    args = test_linear_difference.case(3, 70, 20, 24, 1e-2) | {"norm": norm_of(70, 20)}
    args["delta"][1, 33, 3] = args["residual"][0, 69, 2] = math.nan
    yield Case("NaN", args, test_linear_difference.bound(args, tensor_cores=True).nan_to_num(0), nan=True)


@cases
def mlp_difference() -> Iterator[Case]:
    large = [(9, 150, 192, 300, 192), (3, 70, 100, 400, 300)]
    for k, (p, r, width, outs) in enumerate([*_ROWS, (0, 2, 3, 4), *(row[:3] + row[4:] for row in large)]):
        hidden = large[k - 7][3] if k > 6 else (130, 50, 1, 40, 33, 20, 5)[k]
        for normed, residual, (dtype, out_dtype) in (
            (True, None, _HALVES[k % 4]),
            (k % 2 == 0, (torch.float32, torch.bfloat16)[k % 2], _HALVES[(k + 1) % 4]),
        ):
            args = test_mlp_difference.case(p, r, width, hidden, outs, (0.01, 3.0)[k % 2])
            args["delta"] = args["delta"].to(dtype)
            args["residual"] = None if residual is None else args["residual"].to(residual)
            if normed:
                args["norm"] = norm_of(r, width)
            operands = (torch.float32, torch.bfloat16)[k // 2 % 2] if normed else dtype
            bound = test_mlp_difference.bound(args, HALF if operands == torch.bfloat16 else 0.0, tensor_cores=True)
            args |= {"operands": operands, "out_dtype": out_dtype, "approximate": ("none", "tanh")[k // 2 % 2]}
            name = f"{(p, r, width, hidden, outs)}, norm={normed}, residual={residual}, {dtype} by {operands} to "
            yield Case(f"{name}{out_dtype}", args, bound, dtype, r > 40)
    for approximate in ("none", "tanh"):  # a layer of one column shows GELU alone
        z = torch.cat([test_gelu_difference.SPECIAL, torch.linspace(-16, 16, 101)])[:, None]
        steps = torch.tensor([1e-30, 1e-8, 0.01, 0.125, 0.2499, 0.25, 0.2501, 0.5, 2.0, 20.0])
        delta = torch.cat([steps, -steps])[:, None, None].expand(-1, len(z), -1)
        args = {"delta": delta, "up": torch.ones(1, 1), "z": z, "down": torch.ones(1, 1), "approximate": approximate}
        yield Case(f"a sweep, {approximate}", args, test_mlp_difference.bound(args, tensor_cores=True))
    args = test_mlp_difference.case(3, 70, 20, 40, 24, 1e-2) | {"norm": norm_of(70, 20)}
    args["delta"][1, 33, 3] = args["z"][5, 39] = args["residual"][0, 69, 2] = math.nan
    yield Case("NaN", args, test_mlp_difference.bound(args, tensor_cores=True).nan_to_num(0), nan=True)


@cases
def self_attention_difference() -> Iterator[Case]:
    """Small steps: where the change is nearly linear the bound tells a wrong term from a rounding."""
    for shape in (*test_self_attention_difference.SHAPES[:2], (3, 2, 2, 9, 16, 8, 24, 20)):
        for change in ({}, {"residual": None, "norm": None}):
            args = test_self_attention_difference.case(shape, 1e-2) | change
            yield Case(
                f"{shape}, {'alone' if change else 'whole'}",
                args,
                test_self_attention_difference.bound(args, tensor_cores=True),
            )
    for dtype, out_dtype in ((torch.bfloat16, torch.float32), (torch.bfloat16,) * 2, (torch.float32,) * 2):
        args = test_self_attention_difference.case((2, 2, 2, 5, 4, 6, 7, 9), 1e-2) | {"residual": None, "norm": None}
        for name in ("delta", "weight", "project"):
            args[name] = args[name].bfloat16().float()  # so that the change of the attention alone is rounded
        bound = test_self_attention_difference.bound(args, HALF, tensor_cores=True)
        args["delta"] = args["delta"].to(dtype)
        args |= {"operands": torch.bfloat16, "out_dtype": out_dtype}
        yield Case(f"{dtype} by bfloat16 to {out_dtype}", args, bound, dtype)
    args = test_self_attention_difference.case((2, 3, 2, 5, 4, 6, 7, 9), 1e-2)
    args["delta"][1, 7, 3] = math.nan
    yield Case(
        "NaN",
        args,
        test_self_attention_difference.bound({**args, "delta": args["delta"].nan_to_num(0)}, tensor_cores=True),
        nan=True,
    )
