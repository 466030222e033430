from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .. import backends
from .._check import Pair
from .._op import Kernel, Op
from ._batch_norm import AFTER, norm_after_convolution
from ._convolution import CHANNEL, channel_geometry

OP = Op(__name__, *CHANNEL, *AFTER, cpu=Kernel())


def channel_conv2d_batch_norm(
    delta: Tensor,
    channel: Tensor,
    weight: Tensor,
    zc: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    eps: float = 1e-5,
    training: bool = True,
    relu: bool = False,
    pool: int = 1,
    mean: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A single-channel difference through a conv2d, batch norm, ReLU and max pooling.

    out[p] = dense_batch_norm(channel_conv2d(delta, channel, weight), zc, ...)[p]
    where y = gamma / sqrt(var + eps) * zc + beta, and gap = max(y, 0) minus the maximum of its window

    delta, channel, weight  as in channel_conv2d with groups=1
    zc           [N, O, Ho, Wo]  base input of the norm minus its mean, dtype of delta
    var          [O] float64     its biased variance over N, Ho, Wo (training), or the running variance
    gamma, beta  [O]             weight and bias of the norm, float32 or float64; None means 1 and 0
    relu         must be True with pool > 1
    mean         return the mean over each image and channel
    result       [P, N, O, Ho // pool, Wo // pool]  a view of contiguous [P, N, Ho // pool, Wo // pool, O] memory;
                 [P, N, O] with mean

    The result has the dtype of delta unless out_dtype is given.

    Exactness: as in dense_batch_norm of the values of channel_conv2d. y is recomputed from zc and may differ from the
    model's own value by rounding.
    Cost: 4 * kh * kw operations per value of the convolution, which is computed twice and not stored. zc is read
    fastest from contiguous [O, N, Ho, Wo] memory.
    """
    sizes = OP(delta, channel, weight, zc, var, gamma, beta)
    stride, padding, dilation = channel_geometry(OP.name, sizes, channel, stride, padding, dilation, 1, zc=zc)
    norm, options = norm_after_convolution(
        OP.name, sizes, var, gamma, beta, eps=eps, training=training, relu=relu, pool=pool
    )
    return backends.run(
        OP.name, delta, delta, channel, weight, zc, *norm, stride=stride, padding=padding, dilation=dilation,
        **options, mean=bool(mean), out_dtype=check.float_dtype(OP.name, "out_dtype", out_dtype, delta.dtype),
    )  # fmt: skip
