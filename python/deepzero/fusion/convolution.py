"""Convolutions with the norms around them: both, where a device's kernels take them; the one after, for one channel."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

import dzkernels

from ..carriers import Carrier, Dense, OneChannel, OneEntry, Zero
from ..graph.nodes import Convolution, ImageMean
from . import policy
from .norm import NormRegion, dense_norm, saved
from .pattern import Pattern, constant
from .region import Region, ahead, only_if

if TYPE_CHECKING:
    from ..block import Block


def _takes_moments(after: NormRegion) -> bool:
    return after.norm.training


def _saves_traffic(conv: Convolution, *, norm_before: bool, moments: bool) -> bool:
    """Counted in values of a difference through memory.

    With the norm before it, the convolution reads its input once for each strip of output channels, where the norm
    alone reads it and writes what the convolution reads; moments save the next norm one reading.
    """
    if conv.node.meta["val"].dim() != 4 or conv.transposed or conv.groups > 1:
        return False  # with groups, a program would read the channels of other groups too
    read, written = conv.input.meta["val"][0].numel(), conv.node.meta["val"][0].numel()
    strips = -(-conv.node.meta["val"].shape[1] // policy.STRIP)
    alone = read * (3 if norm_before else 1) + written * moments
    return bool(read * strips < alone)


def _small_images(conv: Convolution) -> bool:
    return bool(conv.node.meta["val"].shape[2:].numel() <= policy.CACHED_PIXELS)


@dataclass(frozen=True)
class NormConvolutionRegion(Region):
    """A norm whose result the convolution alone reads.

    An activation that others read too (the residual of a block) has to be written all the same. The region would save
    one reading of it, a seventh of a residual block's traffic, and apply norm and sum again for every weight that
    reads it, so the norm keeps it: in one pass, with the moments that the convolution before left.
    """

    before: NormRegion
    conv: Convolution
    moments: NormRegion | None = field(metadata=ahead(_takes_moments))

    def fits(self, inside: Collection[fx.Node]) -> bool:
        known = self.before.pool is None and self.before.norm.input in inside
        return known and _saves_traffic(self.conv, norm_before=True, moments=self.moments is not None)


@dataclass(frozen=True)
class ConvolutionMomentsRegion(Region):
    """A convolution that leaves the moments of its result for the norm in training that alone reads it."""

    conv: Convolution
    moments: NormRegion | None = field(metadata=ahead(_takes_moments))

    def fits(self, inside: Collection[fx.Node]) -> bool:
        known = self.moments is not None and self.conv.input in inside
        return known and _saves_traffic(self.conv, norm_before=False, moments=True)


@dataclass(frozen=True)
class ConvolutionNormRegion(Region):
    """A convolution, its norm and the mean of small images, for one weight or one input channel that moves."""

    conv: Convolution
    norm: NormRegion
    mean: ImageMean | None = field(metadata=only_if(lambda found: _small_images(found["conv"])))

    def fits(self, inside: Collection[fx.Node]) -> bool:
        return self.conv.node.meta["val"].dim() == 4 and not self.conv.transposed and self.norm.residual is None


def _next_zc(block: Block, moments: NormRegion | None) -> Tensor | None:
    return None if moments is None else saved(block, moments).zc.images


def _with_moments(block: Block, conv: Convolution, result: Tensor | tuple[Tensor, Tensor]) -> Carrier:
    if isinstance(result, tuple):
        result, block.moments[conv.node] = result
    return Dense(result)


def launch_norm_convolution(block: Block, region: NormConvolutionRegion) -> Carrier | None:
    before, conv = region.before, region.conv
    d, extra = block.raw(before.norm.input), block.raw(before.added)
    if block.dtype is not torch.float32 or not isinstance(d, Dense):
        return None
    if not constant(block, conv.weight, conv.bias, *before.norm.parameters):
        return None
    if not (extra is Zero or isinstance(extra, Dense) or (isinstance(extra, OneChannel) and extra.dim == 1)):
        return None
    result = dzkernels.batch_norm_conv2d(
        weight=block.low(conv.weight).to(block.operands), **dense_norm(block, before, d, extra), **conv.spacing,
        next_zc=_next_zc(block, region.moments),
    )  # fmt: skip
    return _with_moments(block, conv, result)


def launch_convolution_moments(block: Block, region: ConvolutionMomentsRegion) -> Carrier | None:
    conv = region.conv
    d = block.raw(conv.input)
    if block.dtype is not torch.float32 or not isinstance(d, Dense) or not constant(block, conv.weight, conv.bias):
        return None
    weight = block.low(conv.weight).to(block.operands)
    result = dzkernels.dense_conv2d(
        d.values.to(block.operands), weight, **conv.spacing, groups=1, next_zc=_next_zc(block, region.moments)
    )
    return _with_moments(block, conv, result)


def launch_convolution_norm(block: Block, region: ConvolutionNormRegion) -> Carrier | None:
    conv, norm = region.conv, region.norm.norm
    if block.dtype is not torch.float32 or not constant(block, conv.bias, *norm.parameters):
        return None
    dx, dw = block.raw(conv.input), block.raw(conv.weight)
    zc, var, _, _ = saved(block, region.norm)
    options: dict[str, Any] = {
        **conv.spacing,
        "zc": zc.planes,
        "var": var,
        "gamma": None if norm.weight is None else block.exact(norm.weight),
        "beta": None if norm.bias is None else block.exact(norm.bias),
        "eps": norm.eps,
        "training": norm.training,
        "relu": region.norm.relu is not None,
        "pool": region.norm.window,
    }
    shape = tuple(block.exact(region.out).shape)
    if dx is Zero and isinstance(dw, OneEntry):
        images = block.planes(conv.input)
        out = dzkernels.conv2d_tap_batch_norm(
            images, dw.index, dw.step, kernel=dw.shape[2:], groups=conv.groups, **options
        )
        out = out if region.mean is None else out.mean((2, 3), keepdim=True)
        return OneChannel(shape, 1, dw.index[:, 0], out.reshape(block.count, shape[0], *shape[2:]))
    if dw is Zero and isinstance(dx, OneChannel) and dx.dim == 1 and conv.groups == 1:
        out = dzkernels.channel_conv2d_batch_norm(
            dx.values, dx.channel, block.low(conv.weight), **options, mean=region.mean is not None,
            out_dtype=block.operands,
        )  # fmt: skip
        return Dense(out if region.mean is None else out.reshape(block.count, *shape))
    return None


def _one_channel_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    if policy.norms_around_convolutions(device, dtype):
        return False
    return policy.has_fused_kernel("channel_conv2d_batch_norm", device)


NORM_CONVOLUTION = Pattern(
    "norm and convolution",
    NormConvolutionRegion,
    launch_norm_convolution,
    wanted=policy.norms_around_convolutions,
    encloses=True,
)
CONVOLUTION_MOMENTS = Pattern(
    "convolution and moments",
    ConvolutionMomentsRegion,
    launch_convolution_moments,
    wanted=policy.norms_around_convolutions,
    encloses=True,
)
CONVOLUTION_NORM = Pattern(
    "convolution and norm",
    ConvolutionNormRegion,
    launch_convolution_norm,
    wanted=_one_channel_kernels,
    encloses=True,
)
