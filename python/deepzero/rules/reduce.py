"""Reductions: sums and means are linear, extrema go by the winning element, norms by differences of roots."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..carriers import Carrier, Dense, OneChannel, OneEntry, Zero, dense, occurs, one_channel
from .pointwise import absolute, power
from .registry import aten, rule

if TYPE_CHECKING:
    from ..block import Block


def _dims(node: fx.Node, position: int, rank: int) -> list[int]:
    dims = node.args[position] if len(node.args) > position else None
    if dims is None or dims == []:
        return list(range(rank))
    dims = [dims] if isinstance(dims, int) else dims
    return sorted(k % rank for k in dims) if rank else []  # type: ignore[operator,union-attr]


def _keep(node: fx.Node, position: int) -> bool:
    return bool(node.args[position]) if len(node.args) > position else bool(node.kwargs.get("keepdim", False))


@rule(aten.mean.dim, aten.sum.dim_IntList, aten.mean.default, aten.sum.default, family="linear")
def total(block: Block, node: fx.Node) -> Carrier:
    """Sum or mean. One that ends in a single number is accumulated in float64: it is the loss, or part of it."""
    d = block.d(node.args[0])
    rank = len(d.shape)
    dims, keep = _dims(node, 1, rank), _keep(node, 2)
    if isinstance(d, OneEntry) and rank:
        d = one_channel(d, max(range(rank), key=lambda k: d.shape[k]))
    function = torch.mean if node.target in (aten.mean.dim, aten.mean.default) else torch.sum
    wide = len(dims) == rank
    if isinstance(d, OneChannel) and d.dim not in dims:
        inner = [k + 1 - (k > d.dim) for k in dims]
        values = function(d.values, inner, keepdim=keep)
        target = d.dim if keep else d.dim - sum(k < d.dim for k in dims)
        return OneChannel(tuple(block.exact(node).shape), target, d.channel, values)
    if isinstance(d, OneChannel):
        inner = [k + 1 - (k > d.dim) for k in dims if k != d.dim]
        values = d.values.double() if wide else d.values
        values = torch.sum(values, inner, keepdim=keep) if inner else values
        values = values.unsqueeze(d.dim + 1) if keep else values
        if function is torch.mean:
            values = values / math.prod(d.shape[k] for k in dims)
        return Dense(values)
    values = dense(d)
    if rank == 0:
        return Dense(values)
    return Dense(function(values, [k + 1 for k in dims], keepdim=keep, dtype=torch.float64 if wide else None))


def _gap(block: Block, node: fx.Node, dims: list[int], largest: bool) -> Tensor:
    """Distance of every element from the winner (zero for the winner itself), rounded once from float64."""

    def make() -> Tensor:
        z = block.exact(node.args[0]).double()
        best = z.amax(dims, keepdim=True) if largest else z.amin(dims, keepdim=True)
        return block.base_rounded(z - best)

    return block.saved(node, "gap", make)


@rule(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default, family="mixes")
def extremum(block: Block, node: fx.Node) -> Carrier:
    """max(z + dz) - max(z) = max over k of (z_k - max z) + dz_k: the winning element's own difference."""
    values = dense(block.d(node.args[0]))
    rank = values.dim() - 1
    dims, keep = _dims(node, 1, rank), _keep(node, 2)
    largest = node.target in (aten.amax.default, aten.max.default)
    moved = _gap(block, node, dims, largest) + values
    inner = [k + 1 for k in dims]
    if not dims:
        return Dense(values)
    return Dense(moved.amax(inner, keepdim=keep) if largest else moved.amin(inner, keepdim=keep))


@rule(aten.max.dim, aten.min.dim, family="mixes")
def extremum_with_index(block: Block, node: fx.Node) -> tuple[Carrier, Carrier]:
    values = dense(block.d(node.args[0]))
    rank = values.dim() - 1
    dim, keep = int(node.args[1]) % max(rank, 1), _keep(node, 2)  # type: ignore[call-overload]
    if rank == 0:
        return Dense(values), Zero
    largest = node.target is aten.max.dim
    moved = _gap(block, node, [dim], largest) + values
    best, where = (moved.max if largest else moved.min)(dim + 1, keepdim=keep)
    jump = (where - block.exact(node)[1]).to(block.dtype)
    return Dense(best), Dense(jump) if occurs(jump != 0) else Zero


@rule(aten.argmax.default, aten.argmin.default, family="mixes")
def arg_extremum(block: Block, node: fx.Node) -> Carrier:
    z = block.exact(node.args[0]).double()
    values = z + dense(block.d(node.args[0])).double()
    dim, keep = (node.args[1] if len(node.args) > 1 else None), _keep(node, 2)
    function = torch.argmax if node.target is aten.argmax.default else torch.argmin
    if dim is None:
        after = function(values.flatten(1), 1).reshape(-1, *block.exact(node).shape)
    else:
        after = function(values, int(dim) % z.dim() + 1, keepdim=keep)  # type: ignore[call-overload]
    return Dense((after - block.exact(node)).to(block.dtype))


@rule(aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims, family="mixes")
def logical(block: Block, node: fx.Node) -> Carrier:
    d = block.d(node.args[0])
    moved = (block.exact(node.args[0]).double() + dense(d).double()) != 0
    rank = moved.dim() - 1
    inner = [k + 1 for k in _dims(node, 1, rank)]
    function = torch.any if "any" in str(node.target) else torch.all
    after = function(moved, inner, keepdim=_keep(node, 2)) if inner else moved
    return Dense((after.double() - block.exact(node).double()).to(block.dtype))


@rule(aten.linalg_vector_norm.default, family="mixes")
def vector_norm(block: Block, node: fx.Node) -> Carrier:
    """p = 2 by the difference of the square roots of the sums of squares; p = 1 and infinity through |z|."""
    order = node.args[1] if len(node.args) > 1 else 2
    values = dense(block.d(node.args[0]))
    z = block.low(node.args[0])
    rank = z.dim()
    dims, keep = _dims(node, 2, rank), _keep(node, 3)
    inner = [k + 1 for k in dims]
    if order == math.inf:
        gap = block.saved(node, "gap", lambda: block.base_rounded(_abs_gap(block.exact(node.args[0]), dims)))
        return Dense((gap + absolute(values, z)).amax(inner, keepdim=keep))
    if order <= 0:  # type: ignore[operator]
        return block.fallback(node)
    return Dense(_norm(values, z, block.exact(node), float(order), inner, keep).to(block.dtype))  # type: ignore[arg-type]


def _norm(values: Tensor, z: Tensor, before: Tensor, order: float, inner: list[int], keep: bool) -> Tensor:
    """(sum |z + dz|^p)^(1/p) - (sum |z|^p)^(1/p), in float64."""
    if order == 1:
        return absolute(values, z).sum(inner, keepdim=keep, dtype=torch.float64)
    if order == 2:
        squares = (values * (2 * z + values)).sum(inner, keepdim=keep, dtype=torch.float64)
        after = (before * before + squares).clamp(min=0).sqrt()
        return torch.where(squares == 0, 0.0, squares / (after + before))
    grown = power(absolute(values, z), z.abs(), order).sum(inner, keepdim=keep, dtype=torch.float64)
    return power(grown, before.double() ** order, 1 / order)


@rule(aten._cdist_forward.default, family="mixes", data=(0, 1))
def pairwise_distances(block: Block, node: fx.Node) -> Carrier:
    """|a_i - b_j| for all pairs, as norms of the differences of rows."""
    a, b, order, _ = node.args
    if order in (0, math.inf):
        return block.fallback(node)
    z = block.exact(a).unsqueeze(-2) - block.exact(b).unsqueeze(-3)
    da, db = block.d(a), block.d(b)
    values = torch.zeros((), dtype=block.dtype, device=z.device)
    values = values if da is Zero else values + dense(da).unsqueeze(-2)
    values = values if db is Zero else values - dense(db).unsqueeze(-3)
    values = values.expand(block.count, *z.shape)
    return Dense(
        _norm(values, block.base_rounded(z), block.exact(node), float(order), [z.dim()], False).to(block.dtype)
    )  # type: ignore[arg-type]


def _abs_gap(z: Tensor, dims: list[int]) -> Tensor:
    magnitude = z.abs()
    return magnitude - magnitude.amax(dims, keepdim=True)


@rule(aten.var.correction, aten.var_mean.correction, aten.var.dim, family="mixes")
def variance(block: Block, node: fx.Node) -> Any:
    """dvar = sum(2 zc dzc + dzc^2) / (n - correction), centred."""
    values = dense(block.d(node.args[0]))
    z = block.exact(node.args[0])
    rank = z.dim()
    dims = _dims(node, 1, rank)
    if node.target is aten.var.dim:
        correction, keep = float(node.args[2] if len(node.args) > 2 else True), _keep(node, 3)  # type: ignore[arg-type]
    else:
        given = node.kwargs.get("correction")
        correction, keep = 1.0 if given is None else float(given), bool(node.kwargs.get("keepdim", False))  # type: ignore[arg-type]
    count = math.prod(z.shape[k] for k in dims)
    inner = [k + 1 for k in dims]
    zc = block.saved(node, "centred", lambda: block.base_rounded(z - z.mean(dims, keepdim=True)))
    shift = values.mean(inner, keepdim=True, dtype=torch.float64)
    dzc = values - shift.to(values.dtype)
    dvar = (dzc * (2 * zc + dzc)).sum(inner, keepdim=keep, dtype=torch.float64) / max(count - correction, 0)
    out = Dense(dvar)
    if node.target is aten.var_mean.correction:
        moved = shift if keep else shift.reshape(len(shift), *[s for k, s in enumerate(z.shape) if k not in dims])
        return out, Dense(moved)
    return out


@rule(aten.prod.dim_int, aten.prod.default, family="mixes")
def product(block: Block, node: fx.Node) -> Carrier:
    """prod(z + dz) - prod(z), one factor at a time: sum_k (prod of moved before k) dz_k (prod of old after k)."""
    values = dense(block.d(node.args[0]))
    z = block.low(node.args[0])
    if node.target is aten.prod.default:
        values, z = values.reshape(len(values), -1), z.reshape(-1)
    dim = int(node.args[1]) % z.dim() if len(node.args) > 1 else 0  # type: ignore[call-overload]
    keep = _keep(node, 2)
    d, p = torch.zeros_like(values.select(dim + 1, 0)), torch.ones_like(z.select(dim, 0))
    for k in range(z.shape[dim]):
        a, da = z.select(dim, k), values.select(dim + 1, k)
        d, p = d * (a + da) + p * da, p * a
    return Dense(d.unsqueeze(dim + 1) if keep else d)


@rule(aten.cumprod.default, family="mixes")
def cumulative_product(block: Block, node: fx.Node) -> Carrier:
    """As the product, keeping every partial one."""
    values, z = dense(block.d(node.args[0])), block.low(node.args[0])
    dim = int(node.args[1]) % z.dim()  # type: ignore[call-overload]
    partial = block.low(node)
    d, p = torch.zeros_like(values.select(dim + 1, 0)), torch.ones_like(z.select(dim, 0))
    rows = []
    for k in range(z.shape[dim]):
        da = values.select(dim + 1, k)
        d = d * (z.select(dim, k) + da) + p * da
        p = partial.select(dim, k)
        rows.append(d)
    return Dense(torch.stack(rows, dim + 1))


_ORDER = {
    aten.sort.default: 1,
    aten.sort.stable: 1,
    aten.topk.default: 2,
    aten.median.dim: 1,
    aten.kthvalue.default: 2,
    aten.cummax.default: 1,
    aten.cummin.default: 1,
}
"""op with results (values, indices) that picks values by their order -> where its ``dim`` argument is."""


@rule(*_ORDER, family="mixes")
def order_statistic(block: Block, node: fx.Node) -> tuple[Carrier, Carrier]:
    """The new picks in float64; a value moves as its pick does, plus the distance between the old and the new one."""
    z, d = block.exact(node.args[0]).double(), dense(block.d(node.args[0]))
    position, kwargs = _ORDER[node.target], dict(node.kwargs)
    args = [z + d.double(), *block.exact_args(node)[1:]]
    dim = int(kwargs.pop("dim", args[position] if len(args) > position else -1)) % z.dim()
    if position < len(args):
        args[position] = dim + 1
    else:
        kwargs["dim"] = dim + 1
    index = node.target(*args, **kwargs)[1]  # type: ignore[operator]
    before, at = block.exact(node)
    reduced = index.dim() == z.dim()
    where, old = (index.unsqueeze(dim + 1), before.unsqueeze(dim)) if reduced else (index, before)
    jump = z.expand(len(d), *z.shape).gather(dim + 1, where) - old
    values = (jump + d.gather(dim + 1, where)).to(block.dtype)
    return Dense(values.squeeze(dim + 1) if reduced else values), Dense((index - at).to(block.dtype))
