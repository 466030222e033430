"""The ops: one function each, with its contract. Every backend file of the same stem implements exactly this.

P is the number of perturbations propagated at once, N the number of samples. A difference is the exact change of a
value, in the units of that value. Any P, 0 included; inputs may have any strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from . import _check as check
from . import backends
from ._norm import RowNorm

OPS = (
    "conv2d_tap",
    "channel_conv2d",
    "dense_conv2d",
    "channel_batch_norm",
    "dense_batch_norm",
    "batch_norm_conv2d",
    "conv2d_tap_batch_norm",
    "channel_conv2d_batch_norm",
    "channel_linear_cross_entropy",
    "cross_entropy_difference",
    "gelu_difference",
    "layer_norm_difference",
    "softmax_difference",
    "attention_difference",
    "mlp_difference",
    "linear_difference",
    "self_attention_difference",
)

Pair = int | Sequence[int]


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
    """Change of one output channel of a conv2d when one of its weights grows.

    delta[p, n, u, v] = step[p] * pad(x)[n, g * Cg + c, u * sh + i * dh - ph, v * sw + j * dw - pw]
    with (o, c, i, j) = coord[p], g = o // (out_channels / groups), Cg = Cin / groups

    x       [N, Cin, H, W]  base input of the convolution
    coord   [P, 4] int64    (o, c, i, j), one weight per perturbation; the change is that of output channel o
    step    [P]             growth of that weight, dtype of x
    result  [P, N, Ho, Wo]  contiguous, dtype of x

    Exactness: one rounding per output, so all backends agree bit for bit. Padding gives exactly 0.
    Cost: writes P * N * Ho * Wo values and reads as many; bound by memory traffic.
    """
    op = "conv2d_tap"
    kernel, stride, padding, dilation, _ = _tap_inputs(
        op, x, coord, step, kernel, stride, padding, dilation, groups, out_channels
    )
    return backends.run(
        op, x, x, coord, step, kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
        out_channels=out_channels,
    )  # fmt: skip


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
    """A difference that lives in one input channel per perturbation, through a conv2d.

    out[p, n, o, u, v] = sum_ij pad(delta)[p, n, u * sh + i * dh - ph, v * sw + j * dw - pw] * weight[o, c, i, j]
    with c = channel[p] % Cg for the output channels o of group channel[p] // Cg, and 0 for the others

    delta    [P, N, H, W]           difference of input channel channel[p]
    channel  [P] int64              0 .. groups * Cg - 1
    weight   [O, Cg, kh, kw]        of the convolution, dtype of delta
    result   [P, N, O, Ho, Wo]      a view of contiguous [P, N, Ho, Wo, O] memory (channels last)

    The result has the dtype of delta unless out_dtype is given.

    Exactness: a sum of kh * kw products per output, in any order, rounded once more to another out_dtype.
    Cost: 2 * kh * kw operations per output value of the group.
    """
    op = "channel_conv2d"
    stride, padding, dilation, _ = _channel_inputs(op, delta, channel, weight, stride, padding, dilation, groups)
    if out_dtype is None:
        out_dtype = delta.dtype
    elif out_dtype not in check.FLOATS:
        raise TypeError(f"dz::{op}: out_dtype must be a floating-point dtype, got {out_dtype}")
    return backends.run(
        op, delta, delta, channel, weight, stride=stride, padding=padding, dilation=dilation, groups=groups,
        out_dtype=out_dtype,
    )  # fmt: skip


@overload
def dense_conv2d(
    delta: Tensor, weight: Tensor, *, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1,
    next_zc: None = None,
) -> Tensor: ...  # fmt: skip


@overload
def dense_conv2d(
    delta: Tensor, weight: Tensor, *, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1,
    next_zc: Tensor,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def dense_conv2d(
    delta: Tensor,
    weight: Tensor,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    next_zc: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A difference through a conv2d; with next_zc also what the batch norm after it takes from the result.

    out[p, n, o, u, v] = sum_cij pad(delta)[p, n, g * Cg + c, u * sh + i * dh - ph, v * sw + j * dw - pw]
                         * weight[o, c, i, j]    with g = o // (O / groups)

    delta    [P, N, groups * Cg, H, W]  fastest as a view of contiguous [P, N, H, W, C] memory (channels last)
    weight   [O, Cg, kh, kw]            of the convolution, dtype of delta
    next_zc  [N, O, Ho, Wo]             base input of the norm after it minus its mean, base dtype of dense_batch_norm
    result   [P, N, O, Ho, Wo]          a view of contiguous [P, N, Ho, Wo, O] memory, dtype of delta;
                                        with next_zc the pair of it and its moments

    moments[p, 0] = mean(out[p]), of the result as it was rounded; means over N, Ho, Wo of each channel
    moments[p, 1] = mean(2 next_zc d + d^2), d = out[p] - mean(out[p]): the change of the variance; [P, 2, O] float64

    Exactness: a sum of Cg * kh * kw products per output in any order, accumulated in float32 for bfloat16. A 3x3 kernel
    with stride 1 may be done in tiles (Winograd's F(4x4, 3x3), Lavin and Gray, CVPR 2016): a few times the
    rounding error of the plain sum, and a NaN or infinity spreads over its tile. On tensor cores float32 is the sum of
    two tf32, three products each, as good as the plain sum; there an infinity may give NaN. Moments are in float64 of
    float32 sums of at most 256 terms, about a value near the mean.
    Cost: 2 * Cg * kh * kw operations per output, a quarter of them products in tiles.
    """
    op = "dense_conv2d"
    check.of_dtype(op, "delta", delta, check.FLOATS)
    check.of_shape(op, "delta", delta, (None, None, None, None, None), "[P, N, C, H, W]")
    check.of_dtype(op, "weight", weight, (delta.dtype,))
    check.of_shape(op, "weight", weight, (None, None, None, None), "[O, Cg, kh, kw]")
    check.same_device(op, "weight", weight, "delta", delta)
    stride = check.pair(op, "stride", stride, 1)
    padding = check.pair(op, "padding", padding, 0)
    dilation = check.pair(op, "dilation", dilation, 1)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"dz::{op}: groups must divide the {weight.shape[0]} rows of weight, got {groups}")
    if delta.shape[2] != groups * weight.shape[1]:
        raise ValueError(
            f"dz::{op}: delta must have groups * Cg = {groups * weight.shape[1]} channels, got {delta.shape[2]}"
        )
    kernel = (weight.shape[2], weight.shape[3])
    rows, columns = check.output_size(op, delta.shape[3], delta.shape[4], kernel, stride, padding, dilation)
    _next_zc(op, next_zc, delta, (delta.shape[1], weight.shape[0], rows, columns))
    if delta.shape[0] * delta.shape[1] * weight.shape[0] == 0:
        return _no_images(delta, weight, rows, columns, next_zc)
    return backends.run(
        op, delta, delta, weight, stride=stride, padding=padding, dilation=dilation, groups=groups, next_zc=next_zc
    )


def channel_batch_norm(
    delta: Tensor,
    channel: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    *,
    eps: float = 1e-5,
    training: bool = True,
    y: Tensor | None = None,
    relu: bool = False,
    pool: int = 1,
    gap: Tensor | None = None,
) -> Tensor:
    """A difference that lives in one channel per perturbation, through batch norm, then ReLU, then max pooling.

    With z = x[:, c] - mean[c], c = channel[p], d = delta[p] - mean(delta[p]), s = sqrt(var[c] + eps):
    training: dvar = mean(2 z d + d^2), s' = sqrt(var[c] + dvar + eps)
              a = gamma[c] * (d / s' - z * dvar / (s * s' * (s + s')))
    else:     a = gamma[c] / s * delta[p]
    relu:     a = max(y + a, 0) - max(y, 0)
    pool > 1: out = max of gap + a over windows of pool x pool, without padding; trailing rows and columns are dropped

    delta    [P, N, H, W]     difference of channel channel[p] of x
    channel  [P] int64        0 .. C - 1
    x        [N, C, H, W]     base input of the norm, dtype of delta
    mean     [C] float64      of x over N, H, W; only training looks at x and mean
    var      [C] float64      biased variance of x over N, H, W (training), or the running variance
    gamma    [C]              weight of the norm, float32 or float64; None means 1
    y        [N, C, H, W]     base output of the norm before the ReLU, dtype of delta; needed with relu only
    gap      [N, C, H, W]     base activation minus the maximum of its window (<= 0), dtype of delta; with pool > 1
    result   [P, N, H // pool, W // pool]  contiguous, dtype of delta

    Exactness: as in dense_batch_norm. x, y and gap are read fastest from contiguous [C, N, H, W] memory.
    Cost: reads delta twice, writes the result; the channel of x, y and gap is kept from one perturbation to the next.
    """
    op = "channel_batch_norm"
    check.of_dtype(op, "delta", delta, check.FLOATS)
    check.of_shape(op, "delta", delta, (None, None, None, None), "[P, N, H, W]")
    check.of_dtype(op, "channel", channel, (torch.int64,))
    check.of_shape(op, "channel", channel, (delta.shape[0],), "[P]")
    check.of_dtype(op, "x", x, (delta.dtype,))
    samples, height, width = delta.shape[1:]
    check.of_shape(op, "x", x, (samples, None, height, width), "[N, C, H, W]")
    if delta[:1].numel() == 0 and delta.shape[0] != 0:
        raise ValueError(f"dz::{op}: delta must be non-empty in N, H and W, got {check.shape(delta)}")
    channels = x.shape[1]
    for name, tensor in (("mean", mean), ("var", var)):
        check.of_dtype(op, name, tensor, (torch.float64,))
        check.of_shape(op, name, tensor, (channels,), "[C]")
        check.same_device(op, name, tensor, "delta", delta)
    check.same_device(op, "channel", channel, "delta", delta)
    check.same_device(op, "x", x, "delta", delta)
    if gamma is not None:
        check.of_dtype(op, "gamma", gamma, (torch.float32, torch.float64))
        check.of_shape(op, "gamma", gamma, (channels,), "[C]")
        check.same_device(op, "gamma", gamma, "delta", delta)
    if relu:
        if y is None:
            raise ValueError(f"dz::{op}: y must be given with relu=True, got None")
        check.of_dtype(op, "y", y, (delta.dtype,))
        check.of_shape(op, "y", y, tuple(x.shape), "[N, C, H, W]")
        check.same_device(op, "y", y, "delta", delta)
    _pool(op, pool, height, width)
    if pool > 1:
        if gap is None:
            raise ValueError(f"dz::{op}: gap must be given with pool={pool}, got None")
        check.of_dtype(op, "gap", gap, (delta.dtype,))
        check.of_shape(op, "gap", gap, tuple(x.shape), "[N, C, H, W]")
        check.same_device(op, "gap", gap, "delta", delta)
    if not eps >= 0:
        raise ValueError(f"dz::{op}: eps must be at least 0, got {eps}")
    check.in_range(op, "channel", channel, channels, "channels of x")
    scale = torch.ones_like(mean) if gamma is None else gamma.to(torch.float64)
    return backends.run(
        op, delta, delta, channel, x, mean, var, scale, eps=float(eps), training=bool(training),
        y=y if relu else None, pool=pool, gap=gap if pool > 1 else None,
    )  # fmt: skip


def dense_batch_norm(
    delta: Tensor,
    zc: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    *,
    eps: float = 1e-5,
    training: bool = True,
    residual: Tensor | None = None,
    residual_channel: Tensor | None = None,
    y: Tensor | None = None,
    relu: bool = False,
    pool: int = 1,
    gap: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    """A difference in every channel through batch norm, plus a residual difference, then ReLU, then max pooling.

    training: d = delta[p] - mean(delta[p]), dvar = mean(2 zc d + d^2), s = sqrt(var + eps), s' = sqrt(var + dvar + eps)
              a = gamma * (d / s' - zc * dvar / (s * s' * (s + s'))), means over N, H, W of each channel
    else:     a = gamma / s * delta[p]
    a = a + residual[p] where there is one
    relu:     a = max(y + a, 0) - max(y, 0)
    pool > 1: out = max of gap + a over windows of pool x pool, without padding; trailing rows and columns are dropped

    delta             [P, N, C, H, W]
    zc                [N, C, H, W]     base input of the norm minus its mean, rounded once; base dtype
    var               [C] float64      biased variance of the base input (training), or the running variance
    gamma             [C]              weight of the norm, float32 or float64; None means 1
    residual          [P, N, C, H, W]  any floating-point dtype; or with residual_channel [P] int64 the difference
                      [P, N, H, W]     of that one channel, base dtype
    y                 [N, C, H, W]     base value before the ReLU, residual included, base dtype; needed with relu only
    gap               [N, C, H, W]     base activation minus the maximum of its window (<= 0), base dtype; with pool > 1
    moments           [P, 2, C] float64  of delta, where the convolution before left them (dense_conv2d): mean(delta[p])
                                       and dvar. With training only; a backend may take them anew all the same
    result            [P, N, C, H // pool, W // pool]  a view of contiguous [P, N, H, W, C] memory, dtype out_dtype

    The base dtype, also that of the result unless out_dtype is given, is float64 for a float64 delta, else float32.

    Exactness: float32 arithmetic; moments in float64 of sums of at most 64 float32 terms, about a value near the mean.
    So an output is off by a few roundings of |gamma| * (|d| / s' + |zc dvar| / (s s' (s + s'))) + |residual|, and at
    worst by 70 of |gamma| * (mean|d| / s' + |zc| m / (s s' (s + s'))), m = mean(2 |zc d| + d^2). Nothing cancels: the
    variance is taken anew where it would.
    Cost: reads delta twice, with moments once, and residual once, writes the result; zc, y and gap come from cache.
    """
    op = "dense_batch_norm"
    base = _norm_inputs(op, delta, zc, var, gamma, residual, residual_channel, y, relu, eps, moments, training)
    height, width = delta.shape[3:]
    _pool(op, pool, height, width)
    if pool > 1:
        if gap is None:
            raise ValueError(f"dz::{op}: gap must be given with pool={pool}, got None")
        _base_input(op, "gap", gap, delta, base)
    if out_dtype is None:
        out_dtype = base
    elif out_dtype not in check.FLOATS:
        raise TypeError(f"dz::{op}: out_dtype must be a floating-point dtype, got {out_dtype}")
    scale = torch.ones_like(var) if gamma is None else gamma.to(torch.float64)
    return backends.run(
        op, delta, delta, zc, var, scale, eps=float(eps), training=bool(training), residual=residual,
        residual_channel=residual_channel, y=y if relu else None, pool=pool, gap=gap if pool > 1 else None,
        out_dtype=out_dtype, moments=moments,
    )  # fmt: skip


@overload
def batch_norm_conv2d(
    delta: Tensor, zc: Tensor, var: Tensor, weight: Tensor, gamma: Tensor | None = None, *, eps: float = 1e-5,
    training: bool = True, residual: Tensor | None = None, residual_channel: Tensor | None = None,
    y: Tensor | None = None, relu: bool = False, moments: Tensor | None = None, stride: Pair = 1, padding: Pair = 0,
    dilation: Pair = 1, next_zc: None = None,
) -> Tensor: ...  # fmt: skip


@overload
def batch_norm_conv2d(
    delta: Tensor, zc: Tensor, var: Tensor, weight: Tensor, gamma: Tensor | None = None, *, eps: float = 1e-5,
    training: bool = True, residual: Tensor | None = None, residual_channel: Tensor | None = None,
    y: Tensor | None = None, relu: bool = False, moments: Tensor | None = None, stride: Pair = 1, padding: Pair = 0,
    dilation: Pair = 1, next_zc: Tensor,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def batch_norm_conv2d(
    delta: Tensor,
    zc: Tensor,
    var: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    *,
    eps: float = 1e-5,
    training: bool = True,
    residual: Tensor | None = None,
    residual_channel: Tensor | None = None,
    y: Tensor | None = None,
    relu: bool = False,
    moments: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    next_zc: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A difference in every channel through batch norm, residual and ReLU, and on through a conv2d.

    out[p] = conv2d(a[p], weight), a = dense_batch_norm(delta, zc, var, gamma, ..., out_dtype=weight.dtype)

    For a norm whose output only the convolution reads: a need not be stored.

    delta .. moments  as in dense_batch_norm
    weight            [O, C, kh, kw]  bfloat16 or the base dtype of dense_batch_norm
    next_zc           [N, O, Ho, Wo]  as in dense_conv2d: asks for the moments that the next norm takes
    result            [P, N, O, Ho, Wo]  a view of contiguous [P, N, Ho, Wo, O] memory, dtype of weight;
                      with next_zc the pair of it and its moments [P, 2, O]

    Exactness: a as in dense_batch_norm, rounded to the dtype of weight; sums in float32 (float64 for float64) of
    C kh kw products in any order, of float32 operands each within 48 roundings; the sum is rounded once more.
    Cost: 2 C kh kw operations per output value; reads delta twice, with moments once, and residual once, writes the
    result. A kernel may apply the norm again for every weight that reads it.
    """
    op = "batch_norm_conv2d"
    base = _norm_inputs(op, delta, zc, var, gamma, residual, residual_channel, y, relu, eps, moments, training)
    perturbations, samples, channels, height, width = delta.shape
    check.of_dtype(op, "weight", weight, (base, torch.bfloat16))
    check.of_shape(op, "weight", weight, (None, channels, None, None), "[O, C, kh, kw]")
    check.same_device(op, "weight", weight, "delta", delta)
    stride = check.pair(op, "stride", stride, 1)
    padding = check.pair(op, "padding", padding, 0)
    dilation = check.pair(op, "dilation", dilation, 1)
    kernel = (weight.shape[2], weight.shape[3])
    rows, columns = check.output_size(op, height, width, kernel, stride, padding, dilation)
    _next_zc(op, next_zc, delta, (samples, weight.shape[0], rows, columns))
    if perturbations * weight.shape[0] == 0:
        return _no_images(delta, weight, rows, columns, next_zc)
    scale = torch.ones_like(var) if gamma is None else gamma.to(torch.float64)
    return backends.run(
        op, delta, delta, zc, var, scale, weight, eps=float(eps), training=bool(training), residual=residual,
        residual_channel=residual_channel, y=y if relu else None, moments=moments, stride=stride, padding=padding,
        dilation=dilation, next_zc=next_zc,
    )  # fmt: skip


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
    """Change of one output channel of a conv2d when one of its weights grows, through batch norm, ReLU, max pooling.

    out[p] = channel_batch_norm(conv2d_tap(x, coord, step), o, zc, ...) with o = coord[p, 0]
    where y = gamma / sqrt(var + eps) * zc + beta, and gap the difference of max(y, 0) from the largest of its window

    x .. groups  as in conv2d_tap, which has out_channels = O
    zc           [N, O, Ho, Wo]  base input of the norm minus its mean, dtype of x
    var          [O] float64     its biased variance over N, Ho, Wo (training), or the running variance
    gamma, beta  [O]             weight and bias of the norm, float32 or float64; None means 1 and 0
    relu         needed with pool > 1
    result       [P, N, Ho // pool, Wo // pool]  contiguous, dtype of x

    Exactness: as in channel_batch_norm of the rounded values of conv2d_tap. y is taken anew from zc, and off from what
    the model computed by roundings. x and zc are read fastest from contiguous [C, N, H, W] memory.
    Cost: reads x and zc twice, from cache where successive coordinates have the same channels; writes the result.
    """
    op = "conv2d_tap_batch_norm"
    check.of_dtype(op, "zc", zc, check.FLOATS)
    check.of_shape(op, "zc", zc, (None, None, None, None), "[N, O, Ho, Wo]")
    outs = zc.shape[1]
    kernel, stride, padding, dilation, size = _tap_inputs(
        op, x, coord, step, kernel, stride, padding, dilation, groups, outs
    )
    scale, shift = _norm_after(op, "x", x, zc, var, gamma, beta, (x.shape[0], outs, *size), eps, relu, pool)
    return backends.run(
        op, x, x, coord, step, zc, var, scale, shift, kernel=kernel, stride=stride, padding=padding, dilation=dilation,
        groups=groups, eps=float(eps), training=bool(training), relu=bool(relu), pool=pool,
    )  # fmt: skip


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
    """A difference that lives in one input channel per perturbation, through a conv2d, batch norm, ReLU, max pooling.

    out[p] = dense_batch_norm(channel_conv2d(delta, channel, weight), zc, ...)[p]
    where y = gamma / sqrt(var + eps) * zc + beta, and gap the difference of max(y, 0) from the largest of its window

    delta, channel, weight  as in channel_conv2d, in one group
    zc           [N, O, Ho, Wo]  base input of the norm minus its mean, dtype of delta
    var          [O] float64     its biased variance over N, Ho, Wo (training), or the running variance
    gamma, beta  [O]             weight and bias of the norm, float32 or float64; None means 1 and 0
    relu         needed with pool > 1
    mean         of each image and channel, at the end
    result       [P, N, O, Ho // pool, Wo // pool]  a view of contiguous [P, N, Ho // pool, Wo // pool, O] memory;
                 [P, N, O] with mean

    The result has the dtype of delta unless out_dtype is given.

    Exactness: as in dense_batch_norm of the values of channel_conv2d. y is taken anew from zc, and off from what the
    model computed by roundings. zc is read fastest from contiguous [O, N, Ho, Wo] memory.
    Cost: 4 * kh * kw operations per value of the convolution, which is done twice and stored nowhere.
    """
    op = "channel_conv2d_batch_norm"
    stride, padding, dilation, size = _channel_inputs(op, delta, channel, weight, stride, padding, dilation, 1)
    shape = (delta.shape[1], weight.shape[0], *size)
    scale, shift = _norm_after(op, "delta", delta, zc, var, gamma, beta, shape, eps, relu, pool)
    if out_dtype is None:
        out_dtype = delta.dtype
    elif out_dtype not in check.FLOATS:
        raise TypeError(f"dz::{op}: out_dtype must be a floating-point dtype, got {out_dtype}")
    return backends.run(
        op, delta, delta, channel, weight, zc, var, scale, shift, stride=stride, padding=padding, dilation=dilation,
        eps=float(eps), training=bool(training), relu=bool(relu), pool=pool, mean=bool(mean),
        out_dtype=out_dtype,
    )  # fmt: skip


def _tap_inputs(
    op: str, x: Tensor, coord: Tensor, step: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair,
    groups: int, out_channels: int,
) -> tuple[tuple[int, int], ...]:  # fmt: skip
    """kernel, stride, padding and dilation as pairs, and the size of the output."""
    check.of_dtype(op, "x", x, check.FLOATS)
    check.of_shape(op, "x", x, (None, None, None, None), "[N, Cin, H, W]")
    check.of_dtype(op, "coord", coord, (torch.int64,))
    check.of_shape(op, "coord", coord, (None, 4), "[P, 4]")
    check.of_dtype(op, "step", step, (x.dtype,))
    check.of_shape(op, "step", step, (coord.shape[0],), "[P]")
    check.same_device(op, "coord", coord, "x", x)
    check.same_device(op, "step", step, "x", x)
    kernel = check.pair(op, "kernel", kernel, 1)
    stride = check.pair(op, "stride", stride, 1)
    padding = check.pair(op, "padding", padding, 0)
    dilation = check.pair(op, "dilation", dilation, 1)
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"dz::{op}: groups must be a divisor of the {channels} channels of x, got {groups}")
    if out_channels < 1 or out_channels % groups:
        raise ValueError(f"dz::{op}: out_channels must be a positive multiple of groups = {groups}, got {out_channels}")
    size = check.output_size(op, x.shape[2], x.shape[3], kernel, stride, padding, dilation)
    weight = (out_channels, channels // groups, *kernel)
    if coord.device.type == "cpu" and coord.shape[0]:
        low, high = torch.aminmax(coord, dim=0)
        if int(low.min()) < 0 or any(h >= size for h, size in zip(high.tolist(), weight, strict=True)):
            bad = int(((coord < 0) | (coord >= torch.tensor(weight))).any(1).nonzero()[0, 0])
            raise ValueError(
                f"dz::{op}: coord must be inside the weight {list(weight)}, got coord[{bad}] = {coord[bad].tolist()}"
            )
    return kernel, stride, padding, dilation, size


def _channel_inputs(
    op: str, delta: Tensor, channel: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> tuple[tuple[int, int], ...]:
    """stride, padding and dilation as pairs, and the size of the output."""
    check.of_dtype(op, "delta", delta, check.FLOATS)
    check.of_shape(op, "delta", delta, (None, None, None, None), "[P, N, H, W]")
    check.of_dtype(op, "channel", channel, (torch.int64,))
    check.of_shape(op, "channel", channel, (delta.shape[0],), "[P]")
    check.of_dtype(op, "weight", weight, (delta.dtype,))
    check.of_shape(op, "weight", weight, (None, None, None, None), "[O, Cg, kh, kw]")
    check.same_device(op, "channel", channel, "delta", delta)
    check.same_device(op, "weight", weight, "delta", delta)
    stride = check.pair(op, "stride", stride, 1)
    padding = check.pair(op, "padding", padding, 0)
    dilation = check.pair(op, "dilation", dilation, 1)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"dz::{op}: groups must divide the {weight.shape[0]} rows of weight, got {groups}")
    kernel = (weight.shape[2], weight.shape[3])
    size = check.output_size(op, delta.shape[2], delta.shape[3], kernel, stride, padding, dilation)
    check.in_range(op, "channel", channel, weight.shape[1] * groups, "input channels")
    return stride, padding, dilation, size


def _norm_after(
    op: str, name: str, moved: Tensor, zc: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None,
    shape: tuple[int, ...], eps: float, relu: bool, pool: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weight and bias in float64 of a norm whose input is of `shape` and has the dtype of `moved`."""
    check.of_dtype(op, "zc", zc, (moved.dtype,))
    check.of_shape(op, "zc", zc, shape, "[N, O, Ho, Wo]")
    check.same_device(op, "zc", zc, name, moved)
    if zc.numel() == 0:
        raise ValueError(f"dz::{op}: zc must be non-empty, got {check.shape(zc)}")
    channels = shape[1]
    check.of_dtype(op, "var", var, (torch.float64,))
    for what, values in (("var", var), ("gamma", gamma), ("beta", beta)):
        if values is not None:
            check.of_dtype(op, what, values, (torch.float32, torch.float64))
            check.of_shape(op, what, values, (channels,), "[O]")
            check.same_device(op, what, values, name, moved)
    _pool(op, pool, *shape[2:])
    if pool > 1 and not relu:
        raise ValueError(f"dz::{op}: relu must be True with pool={pool}, got {relu}")
    if not eps >= 0:
        raise ValueError(f"dz::{op}: eps must be at least 0, got {eps}")
    one, nothing = torch.ones_like(var), torch.zeros_like(var)
    return (one if gamma is None else gamma.double()), (nothing if beta is None else beta.double())


def _norm_inputs(
    op: str,
    delta: Tensor,
    zc: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    residual: Tensor | None,
    residual_channel: Tensor | None,
    y: Tensor | None,
    relu: bool,
    eps: float,
    moments: Tensor | None,
    training: bool,
) -> torch.dtype:
    """What the dense norms take; the base dtype."""
    check.of_dtype(op, "delta", delta, check.FLOATS)
    check.of_shape(op, "delta", delta, (None, None, None, None, None), "[P, N, C, H, W]")
    perturbations, samples, channels, height, width = delta.shape
    if delta[:1].numel() == 0 and perturbations != 0:
        raise ValueError(f"dz::{op}: delta must be non-empty in N, C, H and W, got {check.shape(delta)}")
    base = torch.float64 if delta.dtype == torch.float64 else torch.float32
    _base_input(op, "zc", zc, delta, base)
    for name, tensor, dtypes in (("var", var, (torch.float64,)), ("gamma", gamma, (torch.float32, torch.float64))):
        if tensor is not None:
            check.of_dtype(op, name, tensor, dtypes)
            check.of_shape(op, name, tensor, (channels,), "[C]")
            check.same_device(op, name, tensor, "delta", delta)
    if residual_channel is not None and residual is None:
        raise ValueError(f"dz::{op}: residual must be given with residual_channel, got None")
    if residual is not None:
        if residual_channel is None:
            check.of_dtype(op, "residual", residual, check.FLOATS)
            check.of_shape(op, "residual", residual, tuple(delta.shape), "[P, N, C, H, W]")
        else:
            check.of_dtype(op, "residual", residual, (base,))
            check.of_shape(op, "residual", residual, (perturbations, samples, height, width), "[P, N, H, W]")
            check.of_dtype(op, "residual_channel", residual_channel, (torch.int64,))
            check.of_shape(op, "residual_channel", residual_channel, (perturbations,), "[P]")
            check.same_device(op, "residual_channel", residual_channel, "delta", delta)
            check.in_range(op, "residual_channel", residual_channel, channels, "channels")
        check.same_device(op, "residual", residual, "delta", delta)
    if relu:
        if y is None:
            raise ValueError(f"dz::{op}: y must be given with relu=True, got None")
        _base_input(op, "y", y, delta, base)
    if moments is not None:
        if not training:
            raise ValueError(f"dz::{op}: moments must be None with training=False, where no norm reads them")
        check.of_dtype(op, "moments", moments, (torch.float64,))
        check.of_shape(op, "moments", moments, (perturbations, 2, channels), "[P, 2, C]")
        check.same_device(op, "moments", moments, "delta", delta)
    if not eps >= 0:
        raise ValueError(f"dz::{op}: eps must be at least 0, got {eps}")
    return base


def _next_zc(op: str, next_zc: Tensor | None, delta: Tensor, shape: tuple[int, int, int, int]) -> None:
    if next_zc is not None:
        check.of_dtype(op, "next_zc", next_zc, (torch.float64 if delta.dtype == torch.float64 else torch.float32,))
        check.of_shape(op, "next_zc", next_zc, shape, "[N, O, Ho, Wo]")
        check.same_device(op, "next_zc", next_zc, "delta", delta)
        if next_zc.numel() == 0:
            raise ValueError(f"dz::{op}: next_zc must be non-empty, got {check.shape(next_zc)}")


def _no_images(
    delta: Tensor, weight: Tensor, rows: int, columns: int, next_zc: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """What a convolution gives where it has nothing to do."""
    perturbations, samples, outs = *delta.shape[:2], weight.shape[0]
    out = weight.new_empty(perturbations, samples, rows, columns, outs).permute(0, 1, 4, 2, 3)
    return out if next_zc is None else (out, out.new_empty(perturbations, 2, outs, dtype=torch.float64))


def _base_input(op: str, name: str, tensor: Tensor, delta: Tensor, dtype: torch.dtype) -> None:
    """[N, C, H, W] for a delta [P, N, C, H, W]."""
    check.of_dtype(op, name, tensor, (dtype,))
    check.of_shape(op, name, tensor, tuple(delta.shape[1:]), "[N, C, H, W]")
    check.same_device(op, name, tensor, "delta", delta)


def _pool(op: str, pool: int, height: int, width: int) -> None:
    if not isinstance(pool, int) or not 1 <= pool <= max(1, min(height, width)):
        raise ValueError(
            f"dz::{op}: pool must be an integer in 1..{min(height, width)} (height and width), got {pool!r}"
        )


def channel_linear_cross_entropy(
    delta: Tensor, channel: Tensor, weight: Tensor, log_probs: Tensor, target: Tensor
) -> Tensor:
    """Change of the mean cross-entropy when one input feature of the last linear layer moves.

    out = cross_entropy_difference(log_probs, target, dlogits)
    with dlogits[p, n, k] = delta[p, n] * weight[k, channel[p]], which is neither stored nor rounded

    delta      [P, N]                      difference of feature channel[p]
    channel    [P] int64                   0 .. C - 1
    weight     [K, C]                      of the linear layer, dtype of delta
    log_probs  [N, K] float64 or float32   log-softmax of the base logits
    target     [N] int64                   class of each sample
    result     [P] float64

    Exactness: float64 throughout, no cancellation for small changes and no overflow for large ones.
    Cost: one product and one expm1 per perturbation, sample and class.
    """
    op = "channel_linear_cross_entropy"
    check.of_dtype(op, "delta", delta, check.FLOATS)
    check.of_shape(op, "delta", delta, (None, None), "[P, N]")
    perturbations, samples = delta.shape
    check.of_dtype(op, "channel", channel, (torch.int64,))
    check.of_shape(op, "channel", channel, (perturbations,), "[P]")
    check.of_dtype(op, "weight", weight, (delta.dtype,))
    check.of_shape(op, "weight", weight, (None, None), "[K, C]")
    classes = weight.shape[0]
    check.of_dtype(op, "log_probs", log_probs, (torch.float64, torch.float32))
    check.of_shape(op, "log_probs", log_probs, (samples, classes), "[N, K]")
    if samples == 0 or classes == 0:
        raise ValueError(f"dz::{op}: log_probs must have samples and classes, got {check.shape(log_probs)}")
    check.of_dtype(op, "target", target, (torch.int64,))
    check.of_shape(op, "target", target, (samples,), "[N]")
    for name, tensor in (("channel", channel), ("weight", weight), ("log_probs", log_probs), ("target", target)):
        check.same_device(op, name, tensor, "delta", delta)
    check.in_range(op, "channel", channel, weight.shape[1], "columns of weight")
    check.in_range(op, "target", target, classes, "classes")
    return backends.run(op, delta, delta, channel, weight, log_probs.to(torch.float64), target)


def cross_entropy_difference(log_probs: Tensor, target: Tensor, dlogits: Tensor) -> Tensor:
    """Change of the mean cross-entropy when the logits move.

    out[p] = mean_n(log(sum_k p[n, k] exp(d[k])) - d[target[n]]), d = dlogits[p, n], p = exp(log_probs)
    computed as log1p(sum_k p[n, k] expm1(d[k] - d[target[n]])), which holds because each row of p sums to 1

    log_probs  [N, K] float64 or float32   log-softmax of the base logits
    target     [N] int64                   class of each sample
    dlogits    [P, N, K]                   change of the logits
    result     [P] float64

    Exactness: float64 throughout, no cancellation for small changes and no overflow for large ones.
    """
    op = "cross_entropy_difference"
    check.of_dtype(op, "log_probs", log_probs, (torch.float64, torch.float32))
    check.of_shape(op, "log_probs", log_probs, (None, None), "[N, K]")
    samples, classes = log_probs.shape
    if samples == 0 or classes == 0:
        raise ValueError(f"dz::{op}: log_probs must have samples and classes, got {check.shape(log_probs)}")
    check.of_dtype(op, "target", target, (torch.int64,))
    check.of_shape(op, "target", target, (samples,), "[N]")
    check.of_dtype(op, "dlogits", dlogits, check.FLOATS)
    check.of_shape(op, "dlogits", dlogits, (None, samples, classes), "[P, N, K]")
    check.same_device(op, "log_probs", log_probs, "dlogits", dlogits)
    check.same_device(op, "target", target, "dlogits", dlogits)
    check.in_range(op, "target", target, classes, "classes")
    return backends.run(op, dlogits, log_probs.to(torch.float64), target, dlogits)


def gelu_difference(
    delta: Tensor, z: Tensor, *, approximate: str = "none", out_dtype: torch.dtype | None = None
) -> Tensor:
    """Change of GELU when its input moves.

    out[p] = gelu(z + delta[p]) - gelu(z), approximate as in torch.nn.functional.gelu: "none" or "tanh"
    computed as the Taylor series in delta, and where |delta| > 1/4 as max(z + d, 0) - max(z, 0) by cases plus the
    change of the bounded rest

    delta   [P, *s]  any s
    z       [*s]     base input, float64 for a float64 delta, else float32
    result  [P, *s]  contiguous

    The result has the dtype of delta unless out_dtype is given.

    Exactness: float32 arithmetic; off by at most 6 roundings of 1.13 |delta|, 1.13 being the largest slope, at any
    delta, rounded once more to another out_dtype.
    Cost: the coefficients of z once for all P; then reads delta and writes the result, bound by memory traffic.
    """
    op = "gelu_difference"
    check.of_dtype(op, "delta", delta, check.FLOATS)
    if delta.dim() == 0:
        raise ValueError(f"dz::{op}: delta must be of shape [P, *s], got []")
    _base_values(op, "z", z, delta)
    check.of_shape(op, "z", z, tuple(delta.shape[1:]), "[*s]")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"dz::{op}: approximate must be 'none' or 'tanh', got {approximate!r}")
    if out_dtype is None:
        out_dtype = delta.dtype
    elif out_dtype not in check.FLOATS:
        raise TypeError(f"dz::{op}: out_dtype must be a floating-point dtype, got {out_dtype}")
    return backends.run(op, delta, delta, z, approximate=approximate, out_dtype=out_dtype)


def layer_norm_difference(
    delta: Tensor,
    zc: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    *,
    eps: float,
    centre: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Change of layer norm, group norm (rows = sample x group) or RMS norm when its input moves.

    d = delta[p, r] - mean(delta[p, r]), dvar = mean(2 zc d + d^2), s = sqrt(var + eps), s' = sqrt(var + dvar + eps)
    out[p, r] = gamma * (d / s' - zc * dvar / (s * s' * (s + s')))
    centre=False (RMS norm): no mean is taken off; d = delta[p, r], zc is the input itself

    delta   [P, R, M]
    zc      [R, M]       base input minus its mean over the row, rounded once; float64 for a float64 delta, else float32
    var     [R] float64  mean(zc^2) of the row
    gamma   [M]          weight, float32 or float64; None means 1
    result  [P, R, M]    contiguous

    The result has the dtype of delta unless out_dtype is given.

    Exactness: float32 arithmetic, moments of sums of at most 8 float32 terms a lane that go on in float64. Off by at
    most 16 roundings of |gamma| * ((|delta| + |mean|) / s' + |zc| m / (s s' (s + s'))), m = mean(2 |zc d| + d^2);
    s' comes from mean((zc + d)^2), so nothing cancels; rounded once more to another out_dtype. Squares must not
    overflow: |delta|, |zc| < 1e18.
    Cost: reads delta from memory once and from cache twice more, writes the result.
    """
    op = "layer_norm_difference"
    check.of_dtype(op, "delta", delta, check.FLOATS)
    check.of_shape(op, "delta", delta, (None, None, None), "[P, R, M]")
    if delta.shape[2] == 0:
        raise ValueError(f"dz::{op}: delta must be non-empty in M, got {check.shape(delta)}")
    _row_norm(op, "", RowNorm(zc, var, gamma, eps), delta, "M")
    if out_dtype is None:
        out_dtype = delta.dtype
    elif out_dtype not in check.FLOATS:
        raise TypeError(f"dz::{op}: out_dtype must be a floating-point dtype, got {out_dtype}")
    return backends.run(op, delta, delta, zc, var, gamma, eps=float(eps), centre=bool(centre), out_dtype=out_dtype)


def mlp_difference(
    delta: Tensor,
    up: Tensor,
    z: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
    norm: RowNorm | None = None,
    *,
    approximate: str = "none",
    operands: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Change of a transformer's feed-forward layer, linear, GELU, linear, when its input moves.

    out[p] = residual[p] + (gelu(z + d up^T) - gelu(z)) down^T, the change of GELU as in gelu_difference
    d = delta[p], or with a norm layer_norm_difference(delta, *norm)[p]

    delta     [P, R, K]  R rows: samples and tokens
    up        [H, K]     weight of the first linear layer, float64 for a float64 delta, else float32
    z         [R, H]     base input of GELU, likewise
    down      [M, H]     weight of the second, likewise
    residual  [P, R, M]  difference that is added, any floating-point dtype; None means 0
    norm      zc [R, K], var [R] float64, gamma [K] or None, eps; None means there is none
    result    [P, R, M]  contiguous

    The result has the dtype of delta unless out_dtype is given, and so have the operands of the two products.

    Exactness: products as in linear_difference. With a = |d| |up|^T off by at most 1.13 (K + 22) roundings of
    a |down|^T, H + 16 roundings of 1.13 a |down|^T, and one of the result, besides what d is off by. With
    operands=torch.bfloat16 d, the weights and the change of GELU are rounded to it once, and sums stay float32.
    Cost: 2 R H (K + M) operations a perturbation; the hidden layer stays in cache. Meant for weights that do so too.
    """
    op = "mlp_difference"
    check.of_dtype(op, "delta", delta, check.FLOATS)
    check.of_shape(op, "delta", delta, (None, None, None), "[P, R, K]")
    _, rows, width = delta.shape
    _base_values(op, "up", up, delta)
    check.of_shape(op, "up", up, (None, width), "[H, K]")
    hidden = up.shape[0]
    _base_values(op, "z", z, delta)
    check.of_shape(op, "z", z, (rows, hidden), "[R, H]")
    _base_values(op, "down", down, delta)
    check.of_shape(op, "down", down, (None, hidden), "[M, H]")
    if 0 in (width, hidden, down.shape[0]):
        raise ValueError(f"dz::{op}: up and down must be non-empty, got {check.shape(up)} and {check.shape(down)}")
    if norm is not None:
        _row_norm(op, "norm.", norm, delta, "K")
    residual = _residual(op, residual, delta, down.shape[0])
    if approximate not in ("none", "tanh"):
        raise ValueError(f"dz::{op}: approximate must be 'none' or 'tanh', got {approximate!r}")
    options = {"approximate": approximate, **_product_dtypes(op, delta, operands, out_dtype)}
    return backends.run(op, delta, delta, up, z, down, residual, norm, **options)


def linear_difference(
    delta: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    norm: RowNorm | None = None,
    *,
    operands: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Change of a linear layer, with the layer norm before it and the sum after it, when its input moves.

    out[p] = residual[p] + d weight^T
    d = delta[p], or with a norm layer_norm_difference(delta, *norm)[p]

    delta     [P, R, K]  R rows: samples and tokens
    weight    [M, K]     float64 for a float64 delta, else float32
    residual  [P, R, M]  difference that is added, any floating-point dtype; None means 0
    norm      zc [R, K], var [R] float64, gamma [K] or None, eps; None means there is none
    result    [P, R, M]  contiguous

    The result has the dtype of delta unless out_dtype is given, and so have the operands of the product.

    Exactness: float32 arithmetic, on tensor cores the sum of three products of tf32 halves, in any order; there an
    infinity may give NaN. Off by at most K + 16 roundings of |d| |weight|^T and one of the result, besides what d is
    off by; on tensor cores the product of the small halves that is left out, 2^-22, is 4 of the 16, what they are cut
    by 4 more, and a sum in steps of 8 terms the rest. With operands=torch.bfloat16 d and the weight are rounded to it
    once, and sums stay float32.
    Cost: 2 R K M operations a perturbation; reads delta and the residual, writes the result.
    """
    op = "linear_difference"
    check.of_dtype(op, "delta", delta, check.FLOATS)
    check.of_shape(op, "delta", delta, (None, None, None), "[P, R, K]")
    _base_values(op, "weight", weight, delta)
    check.of_shape(op, "weight", weight, (None, delta.shape[2]), "[M, K]")
    if 0 in weight.shape:
        raise ValueError(f"dz::{op}: weight must be non-empty, got {check.shape(weight)}")
    if norm is not None:
        _row_norm(op, "norm.", norm, delta, "K")
    residual = _residual(op, residual, delta, weight.shape[0])
    options = _product_dtypes(op, delta, operands, out_dtype)
    return backends.run(op, delta, delta, weight, residual, norm, **options)


def _row_norm(op: str, prefix: str, norm: RowNorm, delta: Tensor, width: str) -> None:
    """Checks the layer norm of a delta [P, R, width]."""
    _, rows, columns = delta.shape
    zc, var, gamma, eps = norm
    _base_values(op, f"{prefix}zc", zc, delta)
    check.of_shape(op, f"{prefix}zc", zc, (rows, columns), f"[R, {width}]")
    check.of_dtype(op, f"{prefix}var", var, (torch.float64,))
    check.of_shape(op, f"{prefix}var", var, (rows,), "[R]")
    check.same_device(op, f"{prefix}var", var, "delta", delta)
    if gamma is not None:
        check.of_dtype(op, f"{prefix}gamma", gamma, (torch.float32, torch.float64))
        check.of_shape(op, f"{prefix}gamma", gamma, (columns,), f"[{width}]")
        check.same_device(op, f"{prefix}gamma", gamma, "delta", delta)
    if not eps >= 0:
        raise ValueError(f"dz::{op}: {prefix}eps must be at least 0, got {eps}")


def _residual(op: str, residual: Tensor | None, delta: Tensor, columns: int) -> Tensor | None:
    """A residual [P, R, columns], checked, in a dtype that kernels take."""
    if residual is None:
        return None
    check.of_dtype(op, "residual", residual, check.FLOATS)
    check.of_shape(op, "residual", residual, (*delta.shape[:2], columns), "[P, R, M]")
    check.same_device(op, "residual", residual, "delta", delta)
    if delta.dtype != torch.float64 and residual.dtype not in (torch.float32, torch.bfloat16):
        return residual.to(torch.float32)
    return residual


def _product_dtypes(
    op: str, delta: Tensor, operands: torch.dtype | None, out_dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtypes of a product's operands and result, that of delta where none is given."""
    for name, dtype in (("operands", operands), ("out_dtype", out_dtype)):
        if dtype is not None and dtype not in check.FLOATS:
            raise TypeError(f"dz::{op}: {name} must be a floating-point dtype, got {dtype}")
    return {"operands": operands or delta.dtype, "out_dtype": out_dtype or delta.dtype}


def softmax_difference(delta: Tensor, p: Tensor, *, log: bool = False) -> Tensor:
    """Change of softmax, or of log-softmax, when its input moves.

    out[q, r, k] = p[r, k] * expm1(delta[q, r, k] - m), with log: delta[q, r, k] - m
    m = log(sum_k p[r, k] exp(delta[q, r, k])) = log1p(sum_k p[r, k] expm1(delta[q, r, k])), as each row of p sums to 1

    delta   [P, R, K]  where p is 0 its value has no influence, and without log the result there is exactly 0
    p       [R, K]     base softmax, rounded once; float64 for a float64 delta, else float32
    result  [P, R, K]  contiguous, dtype of delta

    Exactness: with x = expm1(delta) and X = sum_k p |x|, off by at most 24 roundings of p (|x| + X) / exp(m), with log
    of |delta| + |m| + X / exp(m); sums of at most 8 float32 terms a lane that go on in float64. Where exp(m) < 1/2 or a
    delta is over 60, float64 throughout with p divided by its sum: one rounding of the result.
    Cost: one exponential an element; reads delta, writes the result.
    """
    op = "softmax_difference"
    check.of_dtype(op, "delta", delta, check.FLOATS)
    check.of_shape(op, "delta", delta, (None, None, None), "[P, R, K]")
    if delta.shape[2] == 0:
        raise ValueError(f"dz::{op}: delta must be non-empty in K, got {check.shape(delta)}")
    _base_values(op, "p", p, delta)
    check.of_shape(op, "p", p, tuple(delta.shape[1:]), "[R, K]")
    return backends.run(op, delta, delta, p, log=bool(log))


def attention_difference(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    *,
    scale: float,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Change of the attention softmax(scale * q k^T + mask) v when q, k and v move.

    dS = scale * (dq k^T + (q + dq) dk^T)
    dA = p * expm1(dS - m), m = log(sum_s p exp(dS)) for each row, as in softmax_difference
    out = dA v + (p + dA) dv

    B is the number of pairs of sample and head; or all tensors have two dimensions, N and H, in its place.

    dq      [P, B, T, D]  differences, None: q (k, v) stands still; at least one is given, all of one dtype
    dk      [P, B, S, D]
    dv      [P, B, S, E]
    q       [B, T, D]     base query, float64 for float64 differences, else float32
    k, v    [B, S, D], [B, S, E]  base key and value, likewise
    p       [B, T, S]     base attention, rounded once, likewise; where it is 0 (masked) it stays exactly 0
    result  [P, B, T, E]  contiguous; with N and H [P, N, H, T, E], a view of contiguous [P, N, T, H, E] memory

    The result has the dtype of the differences unless out_dtype is given. Any strides are read in place as long as
    the last dimension is contiguous.

    Exactness: products as in linear_difference. Off by at most (2 D + 19) roundings of the terms of dS, what they
    become in dA, 24 roundings of dA as in softmax_difference, and (2 S + 17) of the terms of out; where they run in
    order (CPU) by 2 D + 4 and 2 S + 2.
    Cost: 2 T S (D for each of dq and dk, E for each of dv and what moves p) operations and T S exponentials.
    """
    op = "attention_difference"
    moved = [(name, d) for name, d in (("dq", dq), ("dk", dk), ("dv", dv)) if d is not None]
    if not moved:
        raise ValueError(f"dz::{op}: dq, dk or dv must be given, got None for all")
    first, given = moved[0]
    check.of_dtype(op, first, given, check.FLOATS)
    for name, base in (("q", q), ("k", k), ("v", v), ("p", p)):
        check.of_dtype(op, name, base, (torch.float64 if given.dtype == torch.float64 else torch.float32,))
        check.same_device(op, name, base, first, given)
    if q.dim() not in (3, 4):
        raise ValueError(f"dz::{op}: q must be of shape [B, T, D] or [N, H, T, D], got {check.shape(q)}")
    outer, pairs = q.shape[:-2], "B" if q.dim() == 3 else "N, H"
    check.of_shape(op, "k", k, (*outer, None, q.shape[-1]), f"[{pairs}, S, D]")
    check.of_shape(op, "v", v, (*outer, k.shape[-2], None), f"[{pairs}, S, E]")
    check.of_shape(op, "p", p, (*outer, q.shape[-2], k.shape[-2]), f"[{pairs}, T, S]")
    if 0 in (k.shape[-2], k.shape[-1], v.shape[-1]):
        raise ValueError(
            f"dz::{op}: k and v must be non-empty in S, D and E, got {check.shape(k)} and {check.shape(v)}"
        )
    perturbations = given.shape[0] if given.dim() else None
    shapes = {"dq": (q, "T, D"), "dk": (k, "S, D"), "dv": (v, "S, E")}
    for name, d in moved:
        base, meaning = shapes[name]
        check.of_dtype(op, name, d, (given.dtype,))
        check.of_shape(op, name, d, (perturbations, *base.shape), f"[P, {pairs}, {meaning}]")
        check.same_device(op, name, d, first, given)
    if out_dtype is None:
        out_dtype = given.dtype
    elif out_dtype not in check.FLOATS:
        raise TypeError(f"dz::{op}: out_dtype must be a floating-point dtype, got {out_dtype}")
    return backends.run(op, given, dq, dk, dv, q, k, v, p, scale=float(scale), out_dtype=out_dtype)


def self_attention_difference(
    delta: Tensor,
    weight: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    project: Tensor,
    residual: Tensor | None = None,
    norm: RowNorm | None = None,
    *,
    scale: float,
    operands: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Change of a transformer's self-attention, linear, attention, linear, when its input moves.

    out[p] = residual[p] + attended[p] project^T, the heads of attended side by side
    attended = attention_difference(dq, dk, dv, q, k, v, p, scale) where [dq, dk, dv] = d weight[h]^T for head h
    d = delta[p], or with a norm layer_norm_difference(delta, *norm)[p]

    delta     [P, N T, K]     N samples of T tokens
    weight    [H, 2 D + E, K] of the layers that make queries, keys and values: for every head D rows of queries, D of
                              keys, E of values; float64 for a float64 delta, else float32
    q, k      [N, H, T, D]    base queries and keys, likewise
    v         [N, H, T, E]    base values, likewise
    p         [N, H, T, T]    base attention, rounded once, likewise; where it is 0 (masked) it stays exactly 0
    project   [M, H E]        weight of the layer after the attention, likewise
    residual  [P, N T, M]     difference that is added, any floating-point dtype; None means 0
    norm      zc [N T, K], var [N T] float64, gamma [K] or None, eps; None means there is none
    result    [P, N T, M]     contiguous

    The result has the dtype of delta unless out_dtype is given, and so have the linear layers' operands.

    Exactness: as linear_difference, attention_difference and linear_difference one after the other, in float32. With
    operands=torch.bfloat16 d, the weights and the change of the attention are rounded to it once; sums and the
    attention itself stay float32.
    Cost: 2 N T H (K (2 D + E) + 2 T (D + E) + E M) operations a perturbation; what lies between delta and the result
    stays in cache. Meant for weights that do so too.
    """
    op = "self_attention_difference"
    check.of_dtype(op, "delta", delta, check.FLOATS)
    for name, base in (("weight", weight), ("q", q), ("k", k), ("v", v), ("p", p), ("project", project)):
        _base_values(op, name, base, delta)
    check.of_shape(op, "q", q, (None, None, None, None), "[N, H, T, D]")
    samples, heads, tokens, inner = q.shape
    check.of_shape(op, "k", k, tuple(q.shape), "[N, H, T, D]")
    check.of_shape(op, "v", v, (samples, heads, tokens, None), "[N, H, T, E]")
    check.of_shape(op, "p", p, (samples, heads, tokens, tokens), "[N, H, T, T]")
    check.of_shape(op, "delta", delta, (None, samples * tokens, None), "[P, N T, K]")
    outer, width = v.shape[3], delta.shape[2]
    check.of_shape(op, "weight", weight, (heads, 2 * inner + outer, width), "[H, 2 D + E, K]")
    check.of_shape(op, "project", project, (None, heads * outer), "[M, H E]")
    if 0 in (heads, inner, outer, width, len(project)):
        raise ValueError(
            f"dz::{op}: weight, v and project must be non-empty, got {check.shape(weight)}, {check.shape(v)} and "
            f"{check.shape(project)}"
        )
    if norm is not None:
        _row_norm(op, "norm.", norm, delta, "K")
    residual = _residual(op, residual, delta, len(project))
    options = {"scale": float(scale), **_product_dtypes(op, delta, operands, out_dtype)}
    return backends.run(op, delta, delta, weight, q, k, v, p, project, residual, norm, **options)


def _base_values(op: str, name: str, tensor: Tensor, delta: Tensor) -> None:
    check.of_dtype(op, name, tensor, (torch.float64 if delta.dtype == torch.float64 else torch.float32,))
    check.same_device(op, name, tensor, "delta", delta)
