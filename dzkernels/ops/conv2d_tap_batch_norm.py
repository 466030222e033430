from __future__ import annotations

from torch import Tensor

from .. import backends
from .._check import Pair
from .._op import Kernel, Op
from ._batch_norm import AFTER, norm_after_convolution
from ._convolution import TAP, tap_geometry

OP = Op(__name__, *TAP, *AFTER, cpu=Kernel())


def conv2d_tap_batch_norm(
    x: Tensor,
    coord: Tensor,
    step: Tensor,
    zc: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    kernel: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    eps: float = 1e-5,
    training: bool = True,
    relu: bool = False,
    pool: int = 1,
) -> Tensor:
    """Change of one output channel of a conv2d when one weight is perturbed, through batch norm, ReLU and max pooling.

    out[p] = channel_batch_norm(conv2d_tap(x, coord, step), o, zc, ...) with o = coord[p, 0]
    where y = gamma / sqrt(var + eps) * zc + beta, and gap = max(y, 0) minus the maximum of its window

    x .. groups  as in conv2d_tap with out_channels = O
    zc           [N, O, Ho, Wo]  base input of the norm minus its mean, dtype of x
    var          [O] float64     its biased variance over N, Ho, Wo (training), or the running variance
    gamma, beta  [O]             weight and bias of the norm, float32 or float64; None means 1 and 0
    relu         must be True with pool > 1
    result       [P, N, Ho // pool, Wo // pool]  contiguous, dtype of x

    Exactness: as in channel_batch_norm of the rounded values of conv2d_tap. y is recomputed from zc and may differ from
    the model's own value by rounding.
    Cost: reads x and zc twice, from cache where consecutive coordinates have the same channels; writes the result. x
    and zc are read fastest from contiguous [C, N, H, W] memory.
    """
    sizes = OP(x, coord, step, zc, var, gamma, beta)
    kernel, stride, padding, dilation = tap_geometry(
        OP.name, sizes, coord, kernel, stride, padding, dilation, groups, sizes["O"], zc=zc
    )
    norm, options = norm_after_convolution(
        OP.name, sizes, var, gamma, beta, eps=eps, training=training, relu=relu, pool=pool
    )
    return backends.run(
        OP.name, x, x, coord, step, zc, *norm, kernel=kernel, stride=stride, padding=padding, dilation=dilation,
        groups=groups, **options,
    )  # fmt: skip
