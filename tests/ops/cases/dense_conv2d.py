"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import UNIT, normal, small_ints
from ops.calls import BF16, ONES, RESNET, STAGE_3, Compiled, Timed, channels_last, empty, images, products
from ops.case import Case
from ops.moments import centred

# N, C, H, W, O, kernel, stride, padding, dilation, groups
SHAPES = [
    pytest.param((2, 16, 8, 8, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1), id="16 channels"),
    pytest.param((3, 18, 9, 14, 18, (3, 3), (1, 1), (1, 1), (1, 1), 1), id="18 channels, tiles over the edge"),
    pytest.param((1, 8, 5, 7, 70, (3, 3), (1, 1), (0, 0), (1, 1), 1), id="70 outputs, no padding"),
    pytest.param((2, 37, 4, 3, 8, (3, 3), (1, 1), (1, 3), (1, 1), 1), id="37 channels, wide padding"),
    pytest.param((60, 9, 4, 4, 33, (3, 3), (1, 1), (1, 1), (1, 1), 1), id="chunks across perturbations"),
    pytest.param((1, 16, 36, 33, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1), id="an image of several chunks"),
    pytest.param((1, 1, 5, 7, 1, (3, 3), (1, 1), (1, 1), (1, 1), 1), id="one image, one channel"),
    pytest.param((2, 16, 8, 8, 32, (3, 3), (2, 2), (1, 1), (1, 1), 1), id="stride 2"),
    pytest.param((2, 8, 11, 10, 16, (3, 2), (3, 2), (1, 0), (1, 1), 2), id="stride 3, groups"),
    pytest.param((1, 16, 9, 8, 16, (3, 3), (1, 1), (2, 2), (2, 2), 1), id="dilation"),
    pytest.param((2, 4, 1, 1, 10, (1, 1), (1, 1), (0, 0), (1, 1), 1), id="one pixel"),
]


def geometry(shape: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("stride", "padding", "dilation", "groups"), shape[6:], strict=True))


def operands(shape: tuple[Any, ...], make: Any, count: int = 3) -> tuple[Tensor, Tensor]:
    samples, channels, height, width, outs, kernel, *_, groups = shape
    return make(count, samples, channels, height, width, seed=1), make(outs, channels // groups, *kernel, seed=2)


def by_torch(delta: Tensor, weight: Tensor, shape: tuple[Any, ...]) -> Tensor:
    out = F.conv2d(delta.flatten(0, 1).double(), weight.double(), None, *shape[6:])
    return out.unflatten(0, delta.shape[:2])


A, B = 0.75, 1.5
TRANSFORMS = {  # F(4, 3) at 0, +-A, +-B and infinity: of the inputs, the weights and the products
    "inputs": [
        [A**2 * B**2, 0, -(A**2) - B**2, 0, 1, 0],
        *[[0, -s * p * q**2, -(q**2), s * p, 1, 0] for p, q in ((A, B), (B, A)) for s in (1, -1)],
        [0, A**2 * B**2, 0, -(A**2) - B**2, 0, 1],
    ],
    "weights": [
        [1 / (A * B) ** 2, 0, 0],
        *[[x / (2 * p**2 * (p**2 - q**2)) for x in (1, s * p, p**2)] for p, q in ((A, B), (B, A)) for s in (1, -1)],
        [0, 0, 1],
    ],
    "products": [[1, 1, 1, 1, 1, 0], *[[0, A**k, (-A) ** k, B**k, (-B) ** k, float(k == 3)] for k in (1, 2, 3)]],
}


def in_tiles(delta: Tensor, weight: Tensor, shape: tuple[Any, ...], magnitudes: bool) -> Tensor:
    """The convolution by 6x6 tiles in float64; with ``magnitudes`` nothing cancels: what rounding errors scale with."""
    inputs, weights, products = (torch.tensor(m, dtype=torch.float64) for m in TRANSFORMS.values())
    if magnitudes:
        delta, weight, inputs, weights, products = (t.abs() for t in (delta, weight, inputs, weights, products))
    _, _, height, width, _, _, _, (pad_h, pad_w), *_ = shape
    rows, columns = height + 2 * pad_h - 2, width + 2 * pad_w - 2
    images = F.pad(delta.flatten(0, 1).double(), (pad_w, pad_w + 4, pad_h, pad_h + 4))
    patches = images.unfold(2, 6, 4).unfold(3, 6, 4)  # [I, C, down, across, 6, 6]
    moved = torch.einsum("ux,icdaxy,vy->icdauv", inputs, patches, inputs)
    kernels = torch.einsum("ux,ocxy,vy->ocuv", weights, weight.double(), weights)
    out = torch.einsum("xu,icdauv,ocuv,yv->iodxay", products, moved, kernels, products)
    out = out.flatten(4, 5).flatten(2, 3)[:, :, :rows, :columns]
    return out.unflatten(0, delta.shape[:2])


def roundings(delta: Tensor, weight: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """How far a float32 sum may be from the exact one.

    Every term of the sum in tiles is a product of an input transformed twice (each 4 roundings), a weight (1
    rounding, transformed in float64), and is summed over C channels and twice over points (5 roundings each).
    """
    channels, kernel = shape[1] // shape[9], shape[5]
    if kernel == (3, 3) and shape[6] == shape[8] == (1, 1) and shape[9] == 1:
        return (channels + 20) * UNIT[torch.float32] * in_tiles(delta, weight, shape, magnitudes=True)
    terms = channels * kernel[0] * kernel[1]
    return (terms + 1) * UNIT[torch.float32] * by_torch(delta.abs(), weight.abs(), shape)


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


def cases() -> Iterator[Case]:
    # PyTorch on a CPU sums a single channel in an order that depends on its strides
    rows = [(row.id, row.values[0]) for row in SHAPES if row.values[0][1] > 1]
    for k, (name, shape) in enumerate([*rows, *TENSOR_CORES]):
        large, refused = name in LARGE_CONVOLUTIONS or k >= len(rows), () if _for_tensor_cores(shape) else ("cuda",)
        for count, dtype in ((2, torch.float32), (1, torch.bfloat16), (0, torch.float32))[: 3 if k == 0 else 2]:
            delta, weight = (t.to(dtype) for t in operands(shape, normal, count))
            args = {"delta": delta, "weight": weight, **geometry(shape)}
            wide = (delta.float(), weight.float(), shape)
            bound = 2 * roundings(*wide) if count else 0.0  # the reference rounds too
            yield Case(f"{name}, P={count}, {dtype}", args, bound, dtype, large, refused=refused)
            if k % 2 == count % 2:
                args = args | {"next_zc": centred(*by_torch(*wide).shape[1:])}
                yield Case(f"{name}, P={count}, {dtype}, moments", args, bound, dtype, large, refused=refused)
    for name, shape in TENSOR_CORES:
        delta, weight = (t.bfloat16() for t in operands(shape, small_ints, 1))
        args = {"delta": delta, "weight": weight, **geometry(shape)}
        yield Case(f"{name}, small integers", args, None, torch.bfloat16, large=True)


def compiled() -> Iterator[Compiled]:
    for name, shape, dtype, next_zc in (
        ("C 64 bf16", STAGE_3, BF16, empty(*STAGE_3[1:])),
        ("C 64 f32", STAGE_3, torch.float32, empty(*STAGE_3[1:])),
        ("C 16 bf16", RESNET, BF16, empty(*RESNET[1:])),
        ("C 64 bf16 alone", STAGE_3, BF16, None),
        ("ones", ONES, torch.float32, None),
    ):
        args = channels_last(*shape, dtype=dtype), empty(shape[2], shape[2], 3, 3, dtype=dtype)
        yield Compiled(name, args, {"padding": 1, "next_zc": next_zc}, name != "ones")


def timed() -> Iterator[Timed]:
    def make(p: int, n: int, c: int, size: int, dtype: torch.dtype) -> Any:
        return (images(p, n, c, size, size).to(dtype), images(c, c, 3, 3).to(dtype)), {"padding": 1}

    for p, n, c, size in ((2, 32, 16, 32), (4, 128, 18, 8), (4, 32, 32, 16), (8, 32, 64, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            for by_torch in (False, True):
                name = f"{c} channels {size}x{size}, {str(dtype).removeprefix('torch.')}{', by torch' * by_torch}"
                yield Timed(name, partial(make, p, n, c, size, dtype), c * products(p, n, c, size), by_torch)
