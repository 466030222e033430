"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import integers, normal, small_ints
from ops.calls import BF16, RESNET, Compiled, Timed, empty, indices
from ops.case import Case, drawn_convolutions

# N, Cin, H, W, Cout, kernel, stride, padding, dilation, groups
SHAPES = [
    pytest.param((2, 3, 8, 8, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1), id="plain"),
    pytest.param((1, 1, 5, 7, 1, (3, 3), (1, 1), (0, 0), (1, 1), 1), id="one image, one channel"),
    pytest.param((2, 4, 11, 10, 6, (3, 2), (3, 2), (1, 0), (1, 1), 2), id="stride 3, groups"),
    pytest.param((3, 6, 9, 8, 6, (3, 3), (2, 1), (2, 3), (2, 3), 6), id="dilation, depthwise"),
    pytest.param((2, 2, 4, 4, 2, (1, 1), (1, 1), (3, 3), (1, 1), 1), id="mostly padding"),
    pytest.param((2, 2, 1, 1, 2, (3, 3), (1, 1), (1, 1), (1, 1), 1), id="one pixel"),
    pytest.param((1, 2, 3, 40, 2, (1, 5), (1, 4), (0, 2), (1, 1), 1), id="wide row"),
]


def geometry(shape: tuple[Any, ...]) -> dict[str, Any]:
    _, _, _, _, out_channels, kernel, stride, padding, dilation, groups = shape
    return {
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "out_channels": out_channels,
    }


def coordinates(shape: tuple[Any, ...], count: int, seed: int = 0) -> Tensor:
    _, channels, _, _, out_channels, kernel, _, _, _, groups = shape
    sizes = (out_channels, channels // groups, *kernel)
    return torch.stack([integers([count], size, seed=seed + k) for k, size in enumerate(sizes)], 1)


def by_rerun(x: Tensor, coord: Tensor, step: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """conv(w + step) - conv(w) for each perturbation, its output channel only. Exact on small integers."""
    _, channels, _, _, out_channels, kernel, stride, padding, dilation, groups = shape
    weight = small_ints(out_channels, channels // groups, *kernel, seed=9, dtype=x.dtype)
    base = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    planes = []
    for at, h in zip(coord.tolist(), step, strict=True):
        moved = weight.clone()
        moved[tuple(at)] += h
        change = F.conv2d(x, moved, None, stride, padding, dilation, groups) - base
        others = [o for o in range(out_channels) if o != at[0]]
        assert not change[:, others].any()
        planes.append(change[:, at[0]])
    return torch.stack(planes)


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
    *((f"drawn {k}, large", shape) for k, shape in enumerate(drawn_convolutions(40))),
]


def geometries() -> Iterator[tuple[str, int, torch.dtype, tuple[int, int, int, int, int, Any], dict[str, Any]]]:
    for name, (samples, channels, height, width, rows, kernel, *spacing) in CONVOLUTIONS:
        geometry = dict(zip(("stride", "padding", "dilation", "groups"), spacing, strict=True))
        for count in (0, 1, 2):
            for dtype in ((torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16))[count]:
                yield f"{name}, P={count}", count, dtype, (samples, channels, height, width, rows, kernel), geometry


def cases() -> Iterator[Case]:
    for name, count, dtype, (samples, channels, height, width, rows, kernel), geometry in geometries():
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


def compiled() -> Iterator[Compiled]:
    x = empty(*RESNET[1:])
    taps = {"kernel": 3, "padding": 1, "out_channels": 16}
    for name, dtype in (("f32", torch.float32), ("bf16", BF16)):
        yield Compiled(name, (x.to(dtype), indices(96, 4), empty(96, dtype=dtype)), taps)
    yield Compiled("ones", (empty(1, 1, 1, 1), indices(1, 4), empty(1)), {"kernel": 1, "out_channels": 1}, False)


def timed() -> Iterator[Timed]:
    def make(p: int, n: int, c: int, size: int) -> Any:
        coord = torch.stack([torch.arange(p) % c, torch.arange(p) % c, torch.arange(p) % 3, torch.arange(p) % 3], 1)
        taps = {"kernel": 3, "padding": 1, "out_channels": c}
        return (torch.randn(n, c, size, size), coord, torch.full((p,), 5e-3)), taps

    yield Timed("W1 first layer, P 16", lambda: make(16, 128, 3, 32))
    yield Timed("W2 stage 3, P 64", lambda: make(64, 32, 64, 8))
