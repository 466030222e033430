from __future__ import annotations

from torch import Tensor

from .. import backends
from .._check import Pair
from .._op import BFLOAT16, Kernel, Op
from ._convolution import TAP, tap_geometry

OP = Op(__name__, *TAP, cpu=Kernel(), triton=Kernel(BFLOAT16), cuda=Kernel())


def conv2d_tap(
    x: Tensor,
    coord: Tensor,
    step: Tensor,
    *,
    kernel: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    out_channels: int,
) -> Tensor:
    """Change of one output channel of a conv2d when one of its weights is perturbed.

    delta[p, n, u, v] = step[p] * pad(x)[n, g * Cg + c, u * sh + i * dh - ph, v * sw + j * dw - pw]
    with (o, c, i, j) = coord[p], g = o // (out_channels / groups), Cg = Cin / groups

    x       [N, Cin, H, W]  base input of the convolution
    coord   [P, 4] int64    (o, c, i, j), the perturbed weight; the result is the change of output channel o
    step    [P]             the change of that weight, dtype of x
    result  [P, N, Ho, Wo]  contiguous, dtype of x

    Exactness: one rounding per output, so all backends agree bit for bit. Padding gives exactly 0.
    Cost: writes P * N * Ho * Wo values and reads as many; bound by memory bandwidth.
    """
    sizes = OP(x, coord, step)
    kernel, stride, padding, dilation = tap_geometry(
        OP.name, sizes, coord, kernel, stride, padding, dilation, groups, out_channels
    )
    return backends.run(
        OP.name, x, x, coord, step, kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
        out_channels=out_channels,
    )  # fmt: skip
