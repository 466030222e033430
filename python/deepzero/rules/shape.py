"""Ops that move, pick or join values: linear, and mostly able to keep a single entry or channel as it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..carriers import Carrier, Dense, OneChannel, OneEntry, Zero, dense, entry_view, one_channel, without
from .registry import aten, linear, rule

if TYPE_CHECKING:
    from ..block import Block


@rule(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._reshape_alias.default, family="rearranges"
)
def view(block: Block, node: fx.Node) -> Carrier:
    d, shape = block.raw(node.args[0]), tuple(block.exact(node).shape)
    return _reshaped(d, shape)


@rule(
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.flatten.using_ints,
    family="rearranges",
)
def insert(block: Block, node: fx.Node) -> Carrier:
    return _reshaped(block.raw(node.args[0]), tuple(block.exact(node).shape))


def _reshaped(d: Any, shape: tuple[int, ...]) -> Carrier:
    if isinstance(d, OneEntry):
        return entry_view(d, shape)
    if isinstance(d, OneChannel):
        before = math.prod(d.shape[: d.dim])
        for k, size in enumerate(shape):
            if size == d.shape[d.dim] and math.prod(shape[:k]) == before:
                values = d.values.reshape(len(d.channel), *without(shape, k))
                return OneChannel(shape, k, d.channel, values)
    values = dense(d)
    return Dense(values.reshape(len(values), *shape))


@rule(aten.permute.default, family="rearranges")
def permute(block: Block, node: fx.Node) -> Carrier:
    d = block.raw(node.args[0])
    dims = [k % len(d.shape) for k in node.args[1]]  # type: ignore[union-attr,operator]
    return _permuted(d, dims)


@rule(aten.t.default, aten.transpose.int, family="rearranges")
def transpose(block: Block, node: fx.Node) -> Carrier:
    d = block.raw(node.args[0])
    dims = list(range(len(d.shape)))
    a, b = node.args[1:] if len(node.args) == 3 else (0, -1)
    if dims:
        dims[a], dims[b] = dims[b], dims[a]  # type: ignore[index]
    return _permuted(d, dims)


def _permuted(d: Any, dims: list[int]) -> Carrier:
    shape = tuple(d.shape[k] for k in dims)
    if isinstance(d, OneEntry):
        return OneEntry(shape, d.index[:, dims], d.step)
    if isinstance(d, OneChannel):
        rest = [k - (k > d.dim) for k in dims if k != d.dim]
        return OneChannel(shape, dims.index(d.dim), d.channel, d.values.permute(0, *[k + 1 for k in rest]))
    return Dense(d.values.permute(0, *[k + 1 for k in dims]))


@rule(aten.expand.default, family="rearranges")
def expand(block: Block, node: fx.Node) -> Carrier:
    return _expanded(block.raw(node.args[0]), tuple(block.exact(node).shape))


def _expanded(d: Any, shape: tuple[int, ...]) -> Carrier:
    lead = len(shape) - len(d.shape)
    if isinstance(d, OneEntry) and d.shape:
        d = one_channel(d, max(range(len(d.shape)), key=lambda k: d.shape[k]))
    if isinstance(d, OneChannel) and d.shape[d.dim] == shape[lead + d.dim]:
        values = d.values.reshape(len(d.channel), *[1] * lead, *d.values.shape[1:])
        target = lead + d.dim
        return OneChannel(shape, target, d.channel, values.expand(-1, *without(shape, target)))
    values = dense(d)
    values = values.reshape(len(values), *[1] * lead, *values.shape[1:])
    return Dense(values.expand(-1, *shape))


@rule(
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten._to_copy.default,
    family="pointwise",
)
def copy(block: Block, node: fx.Node) -> Any:
    """A copy moves as its source does; a cast to an integer or bool type is piecewise constant."""
    source = block.exact(node.args[0])
    target = block.exact(node)
    if target.is_floating_point() or source.dtype == target.dtype:
        return block.raw(node.args[0])
    d = dense(block.d(node.args[0]))
    moved = source.double() + d.double()
    moved = moved != 0 if target.dtype is torch.bool else moved.to(target.dtype)
    return Dense((moved.double() - target.double()).to(block.dtype))


# Ops that keep a channel dimension apart from the one they work on.


def _other_dim(position: int) -> Any:
    """The channel survives when the op works on another dimension (its argument at ``position``, default 0)."""

    def follow(node: fx.Node, dim: int) -> int | None:
        worked = node.args[position] if len(node.args) > position else 0
        rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        return None if worked % rank == dim else dim  # type: ignore[operator]

    return follow


def _select_dim(node: fx.Node, dim: int) -> int | None:
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    worked = node.args[1] % rank  # type: ignore[operator]
    return None if worked == dim else dim - (dim > worked)


linear(aten.slice.Tensor, follow=_other_dim(1), moves=True, dim=1)
linear(aten.select.int, follow=_select_dim, moves=True, dim=1)
linear(aten.index_select.default, follow=_other_dim(1), moves=True)
linear(aten.roll.default, moves=True)
linear(aten.flip.default, moves=True)
linear(aten.cumsum.default, follow=_other_dim(1))
linear(aten.gather.default, moves=True)
linear(aten.diagonal.default, moves=True)
linear(aten.tril.default)
linear(aten.triu.default)
linear(aten.repeat.default)
linear(aten.unfold.default)
linear(aten.split_with_sizes.default, moves=True, dim=2)
linear(aten.split.Tensor, moves=True, dim=2)
linear(aten.unbind.int, moves=True, dim=1)
linear(aten.reflection_pad1d.default)
linear(aten.reflection_pad2d.default)
linear(aten.reflection_pad3d.default)
linear(aten.replication_pad1d.default)
linear(aten.replication_pad2d.default)
linear(aten.replication_pad3d.default)
linear(aten.pixel_shuffle.default)
linear(aten.pixel_unshuffle.default)
linear(aten.upsample_nearest2d.vec)
linear(aten.upsample_bilinear2d.vec)
linear(aten.im2col.default)
linear(aten.cat.default, 0)
linear(aten.stack.default, 0)
linear(aten.slice_scatter.default, 0, 1, dim=2)
linear(aten.select_scatter.default, 0, 1, dim=2)
linear(aten.scatter.src, 0, 3)
linear(aten.scatter_add.default, 0, 3)
linear(aten.index_put.default, 0, 2)
linear(aten.index.Tensor)


@rule(aten.constant_pad_nd.default, family="rearranges")
def constant_pad(block: Block, node: fx.Node) -> Carrier:
    """The padding does not move, whatever its value; a channel shifts by the padding before it."""
    d, widths = block.raw(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    rank = len(d.shape)
    pairs = [(0, 0)] * rank
    for k in range(len(widths) // 2):
        pairs[rank - 1 - k] = (widths[2 * k], widths[2 * k + 1])
    d = one_channel(d, max(range(rank), key=lambda k: d.shape[k])) if isinstance(d, OneEntry) and rank else d
    if isinstance(d, OneChannel) and min(pairs[d.dim]) >= 0:
        rest = without(pairs, d.dim)  # type: ignore[arg-type]
        flat = [w for pair in reversed(rest) for w in pair]  # type: ignore[attr-defined]
        shape = tuple(block.exact(node).shape)
        values = torch.nn.functional.pad(d.values, flat) if any(flat) else d.values
        return OneChannel(shape, d.dim, d.channel + pairs[d.dim][0], values)
    return Dense(torch.nn.functional.pad(dense(d), widths))


@rule(aten.copy.default, family="rearranges", data=(0, 1))
def copied(block: Block, node: fx.Node) -> Carrier:
    """``destination.copy_(source)``: what the destination held before does not matter."""
    d, shape = block.d(node.args[1]), tuple(block.exact(node).shape)
    return d if d is Zero or tuple(d.shape) == shape else _expanded(d, shape)


@rule(aten.masked_fill.Scalar, family="pointwise")
def masked_fill(block: Block, node: fx.Node) -> Carrier:
    if block.d(node.args[1]) is not Zero:
        return block.fallback(node)
    return Dense(dense(block.d(node.args[0])).masked_fill(block.exact(node.args[1]), 0.0))


@rule(
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.sym_size.int,
    *(getattr(op, name) for op in (aten.rand_like, aten.randn_like, aten.randint_like) for name in op.overloads()),
    family="constant",
)
def shape_only(block: Block, node: fx.Node) -> Carrier:
    """Reads the shape of its input, which never moves; random numbers of that shape are those of the base pass."""
    return Zero
