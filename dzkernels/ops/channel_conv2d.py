from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .. import backends
from .._check import Pair
from .._op import BFLOAT16, Kernel, Op
from ._convolution import CHANNEL, channel_geometry

OP = Op(__name__, *CHANNEL, cpu=Kernel(), triton=Kernel(BFLOAT16), cuda=Kernel())


def channel_conv2d(
    delta: Tensor,
    channel: Tensor,
    weight: Tensor,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A single-channel difference through a conv2d.

    out[p, n, o, u, v] = sum_ij pad(delta)[p, n, u * sh + i * dh - ph, v * sw + j * dw - pw] * weight[o, c, i, j]
    with c = channel[p] % Cg for the output channels o of group channel[p] // Cg, and 0 for the others

    delta    [P, N, H, W]           difference of input channel channel[p]
    channel  [P] int64              0 .. groups * Cg - 1
    weight   [O, Cg, kh, kw]        of the convolution, dtype of delta
    result   [P, N, O, Ho, Wo]      a view of contiguous [P, N, Ho, Wo, O] memory (channels last)

    The result has the dtype of delta unless out_dtype is given.

    Exactness: a sum of kh * kw products per output, in any order. Another out_dtype costs one more rounding.
    Cost: 2 * kh * kw operations per output value of the group.
    """
    sizes = OP(delta, channel, weight)
    stride, padding, dilation = channel_geometry(OP.name, sizes, channel, stride, padding, dilation, groups)
    return backends.run(
        OP.name, delta, delta, channel, weight, stride=stride, padding=padding, dilation=dilation, groups=groups,
        out_dtype=check.float_dtype(OP.name, "out_dtype", out_dtype, delta.dtype),
    )  # fmt: skip
