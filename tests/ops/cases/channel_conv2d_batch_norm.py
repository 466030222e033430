"""channel_conv2d_batch_norm: inputs, and what the results are held against."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import dzkernels
from helpers import integers, normal
from ops.after import U, changed, norm_of

# N, H, W, O, C, kernel, stride, padding, dilation
SHAPES = [
    pytest.param((3, 16, 16, 18, 2, (3, 3), (1, 1), (1, 1), (1, 1)), id="rows of a register"),
    pytest.param((5, 8, 8, 18, 2, (3, 3), (1, 1), (1, 1), (1, 1)), id="rows that share a register"),
    pytest.param((2, 5, 7, 3, 1, (3, 3), (1, 1), (0, 1), (1, 1)), id="odd rows"),
    pytest.param((2, 30, 37, 33, 2, (3, 3), (1, 1), (2, 1), (1, 1)), id="several blocks, 33 channels"),
    pytest.param((2, 17, 16, 4, 4, (3, 2), (3, 2), (1, 0), (1, 1)), id="stride 3"),
    pytest.param((3, 9, 8, 16, 2, (3, 3), (2, 1), (2, 3), (2, 3)), id="dilation"),
    pytest.param((9, 3, 2, 2, 3, (1, 1), (1, 1), (0, 0), (1, 1)), id="two columns"),
]


def inputs(shape: tuple[Any, ...], count: int = 4, scale: float = 0.1) -> dict[str, Any]:
    samples, height, width, outs, channels, kernel, stride, padding, dilation = shape
    args = {
        "delta": normal(count, samples, height, width, seed=1) * scale + 0.3 * scale,
        "channel": integers([count], channels, seed=2),
        "weight": normal(outs, channels, *kernel, seed=3) * 0.5,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }
    size = dzkernels.channel_conv2d(**args).shape[3:]
    return args | norm_of(samples, outs, *size)


def by_rerun(args: dict[str, Any], training: bool, relu: bool, pool: int, mean: bool) -> tuple[Tensor, Tensor]:
    names = ("delta", "channel", "weight", "stride", "padding", "dilation")
    wide = {name: v.double() if isinstance(v := args[name], Tensor) and v.is_floating_point() else v for name in names}
    d = dzkernels.channel_conv2d(**wide)
    sizes = dzkernels.channel_conv2d(**{**wide, "delta": wide["delta"].abs(), "weight": wide["weight"].abs()})
    error = args["weight"][0, 0].numel() * U * sizes
    wanted, bound = changed(d, error, args, training=training, relu=relu, pool=pool)
    if mean:
        terms = wanted.shape[3] * wanted.shape[4]
        bound = (bound + (terms + 1) * U * wanted.abs()).mean((3, 4))
        wanted = wanted.mean((3, 4))
    return wanted, bound
