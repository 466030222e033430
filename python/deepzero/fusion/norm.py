"""Batch norm (+ residual) (+ ReLU) (+ max pool) of images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

import dzkernels
from dzkernels._norm import window_gap

from ..base_pass import Layouts
from ..carriers import Carrier, Dense, OneChannel, OneEntry, Zero, select
from ..graph.nodes import UPDATING, BatchNorm, Relu, Residual, SquarePool, aten
from ..rules.norm import centred
from .pattern import Pattern, constant
from .region import Region, only_if

if TYPE_CHECKING:
    from collections.abc import Collection

    from ..block import Block


@dataclass(frozen=True)
class NormRegion(Region):
    norm: BatchNorm
    residual: Residual | None
    relu: Relu | None
    pool: SquarePool | None = field(metadata=only_if(lambda found: found["relu"] is not None))

    def fits(self, inside: Collection[fx.Node]) -> bool:
        ops = (*UPDATING, aten._native_batch_norm_legit_no_training.default)
        return self.norm.node.target in ops and self.norm.input.meta["val"].dim() == 4

    @property
    def before_relu(self) -> fx.Node:
        return self.residual.node if self.residual is not None else self.nodes[1]

    @property
    def added(self) -> fx.Node | None:
        return None if self.residual is None else self.residual.other

    @property
    def window(self) -> int:
        """Width of the pooling windows, 1 without pooling."""
        return 1 if self.pool is None else self.pool.size


class Saved(NamedTuple):
    """What the kernels read of the base pass, made once a step.

    zc   centred input of the norm
    var  [C] float64
    y    value before the ReLU; None without one
    gap  distance from the winner of each pooling window; None without pooling
    """

    zc: Layouts
    var: Tensor
    y: Layouts | None
    gap: Layouts | None


def saved(block: Block, region: NormRegion) -> Saved:
    return block.saved(region.norm.node, "fused", lambda: _saves(block, region))


def _saves(block: Block, region: NormRegion) -> Saved:
    norm = region.norm
    z = block.exact(norm.input)
    if norm.training:
        zc, v = centred(z, [0, 2, 3])
        v = v.reshape(-1)
    else:
        v = block.exact(norm.var).double()
        zc = z - block.exact(norm.mean).reshape(1, -1, 1, 1)
    y = block.exact(region.before_relu)
    gap = window_gap(y, block.exact(region.out), region.window) if region.pool is not None else None
    return Saved(
        Layouts(zc, block.dtype),
        v,
        Layouts(y, block.dtype) if region.relu is not None else None,
        Layouts(gap, block.dtype) if gap is not None else None,
    )


def launch(block: Block, region: NormRegion) -> Carrier | None:
    norm = region.norm
    if block.dtype is not torch.float32 or not constant(block, norm.mean, norm.var):
        return None
    d, extra = block.raw(norm.input), block.raw(region.added)
    moving = [c for c in (block.raw(norm.weight), block.raw(norm.bias)) if c is not Zero]
    if isinstance(d, Dense):
        if not moving:
            return _dense(block, region, d, extra)
        if all(isinstance(c, Dense) for c in (*moving, *([] if extra is Zero else [extra]))):
            return _dense_moving_affine(block, region)
        return None
    if extra is not Zero:
        return None
    if isinstance(d, OneChannel) and d.dim == 1 and not moving:
        return _one_channel(block, region, d)
    if d is Zero and len(moving) == 1 and isinstance(moving[0], OneEntry):
        return _one_affine_entry(block, region, moving[0])
    return None


def _dense(block: Block, region: NormRegion, d: Dense, extra: Any) -> Carrier | None:
    if isinstance(extra, OneChannel) and extra.dim != 1:
        return None
    gap = saved(block, region).gap
    out = dzkernels.dense_batch_norm(
        **dense_norm(block, region, d, extra), gap=gap.images if gap is not None else None, pool=region.window,
        out_dtype=block.operands,
    )  # fmt: skip
    return Dense(out)


def dense_norm(block: Block, region: NormRegion, d: Dense, extra: Any) -> dict[str, Any]:
    """What dense_batch_norm and batch_norm_conv2d take alike, where neither weight nor bias of the norm moves."""
    norm, (zc, var, y, _) = region.norm, saved(block, region)
    return {
        "delta": d.values,
        "zc": zc.images,
        "var": var,
        "gamma": None if norm.weight is None else block.exact(norm.weight),
        "eps": norm.eps,
        "training": norm.training,
        "residual": None if extra is Zero else extra.values,
        "residual_channel": extra.channel if isinstance(extra, OneChannel) else None,
        "y": y.images if y is not None else None,
        "relu": region.relu is not None,
        "moments": block.moments.get(norm.input) if norm.training else None,
    }


def _dense_moving_affine(block: Block, region: NormRegion) -> Carrier:
    """Everything moves, as with random directions: (gamma + dgamma) d(hat) + dgamma hat + dbeta, one p at a time.

    The kernel takes a weight for all perturbations; the last two terms are a residual difference to it.
    """
    norm, (zc, v, y, gap) = region.norm, saved(block, region)
    d, extra = block.raw(norm.input), block.raw(region.added)
    dgamma, dbeta = block.raw(norm.weight), block.raw(norm.bias)
    hat = block.saved(
        norm.node, "hat", lambda: zc.images * (1 / (v + norm.eps).sqrt()).to(block.dtype).reshape(1, -1, 1, 1)
    )
    out = []
    for p in range(block.count):
        weight, shift = block.exact(norm.weight), torch.zeros((), dtype=block.dtype, device=hat.device)
        if dgamma is not Zero:
            weight = weight + dgamma.values[p]
            shift = hat * dgamma.values[p].reshape(-1, 1, 1)
        if dbeta is not Zero:
            shift = shift + dbeta.values[p].reshape(-1, 1, 1)
        if extra is not Zero:
            shift = shift + extra.values[p]
        moved = dzkernels.dense_batch_norm(
            d.values[p : p + 1], zc.images, v, weight, eps=norm.eps, training=norm.training, out_dtype=block.operands,
            residual=shift.expand(hat.shape).unsqueeze(0), y=y.images if y is not None else None,
            gap=gap.images if gap is not None else None, relu=region.relu is not None, pool=region.window,
        )  # fmt: skip
        out.append(moved.movedim(2, -1))
    return Dense(torch.cat(out).movedim(-1, 2))


def _one_channel(block: Block, region: NormRegion, d: OneChannel) -> Carrier:
    norm, (zc, v, _, _) = region.norm, saved(block, region)
    weight = None if norm.weight is None else block.exact(norm.weight)
    out = dzkernels.channel_batch_norm(
        d.values, d.channel, zc.planes, torch.zeros_like(v), v, weight, eps=norm.eps, training=norm.training,
        **_after(block, region),
    )  # fmt: skip
    return OneChannel(tuple(block.exact(region.out).shape), 1, d.channel, out)


def _one_affine_entry(block: Block, region: NormRegion, entry: OneEntry) -> Carrier:
    """A coordinate of the affine part moves the norm's output by step, or step times the normalised input."""
    norm, (zc, v, _, _) = region.norm, saved(block, region)
    channel, n = entry.index[:, 0], len(entry.step)
    step = entry.step.reshape(n, 1, 1, 1)
    if block.raw(norm.weight) is Zero:
        moved = step.expand(n, *[k for i, k in enumerate(block.exact(norm.input).shape) if i != 1])
    else:
        scale = (1 / (v + norm.eps).sqrt())[channel].to(block.dtype).reshape(n, 1, 1, 1)
        moved = select(zc.planes, 1, channel) * (step * scale)
    nothing = torch.zeros_like(v)
    out = dzkernels.channel_batch_norm(
        moved, channel, zc.planes, nothing, nothing + 1, eps=0.0, training=False, **_after(block, region)
    )
    return OneChannel(tuple(block.exact(region.out).shape), 1, channel, out)


def _after(block: Block, region: NormRegion) -> dict[str, Any]:
    _, _, y, gap = saved(block, region)
    return {
        "relu": region.relu is not None,
        "pool": region.window,
        "y": y.planes if y is not None else None,
        "gap": gap.planes if gap is not None else None,
    }


NORM = Pattern("batch norm", NormRegion, launch)
