"""Normalisation: batch, layer, group. One formula for the normalised value, then the affine part.

With zc = z - mean, dzc = dz - mean(dz), dvar = mean(2 zc dzc + dzc^2), s = sqrt(var + eps) and
s' = sqrt(var + dvar + eps):

    d(zc / s) = dzc / s' - zc dvar / (s s' (s + s'))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

import dzkernels

from ..carriers import Carrier, Dense, OneChannel, OneEntry, Zero, dense, occurs, select
from ..graph.nodes import BatchNorm, LayerNorm
from .registry import aten, rule

if TYPE_CHECKING:
    from ..block import Block


def centred(z: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """z - mean and the variance, in the dtype of z."""
    zc = z - z.mean(dims, keepdim=True)
    return zc, (zc * zc).mean(dims, keepdim=True)


def normalised(dz: Tensor, zc: Tensor, var: Tensor, eps: float, dims: Sequence[int]) -> Tensor:
    """d((z - mean) / sqrt(var + eps)) with the moments over ``dims`` moving too.

    dz [P, ...] query dtype; zc centred base in the query dtype; var float64. Moments are taken in float64. Where
    var + dvar cancels, the new variance is recomputed as mean((zc + dzc)^2).
    """
    shift = dz.mean(dims, keepdim=True, dtype=torch.float64)
    dzc = dz - shift.to(dz.dtype)
    dvar = (dzc * (2 * zc + dzc)).mean(dims, keepdim=True, dtype=torch.float64)
    cancels = var + dvar < 1e-2 * var
    after = var + dvar + eps
    if occurs(cancels):
        after = torch.where(cancels, ((zc + dzc) ** 2).mean(dims, keepdim=True, dtype=torch.float64) + eps, after)
        dvar = torch.where(cancels, after - eps - var, dvar)
    s, s_after = (var + eps).sqrt(), after.sqrt()
    return dzc * (1 / s_after).to(dz.dtype) - zc * (dvar / (s * s_after * (s + s_after))).to(dz.dtype)


def _vector(block: Block, arg: Any, shape: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    """An affine parameter and its difference, shaped to broadcast ([*shape] and [P, *shape]); None where absent."""
    if arg is None:
        return None, None
    d = block.d(arg)
    base = block.low(arg).reshape(shape)
    return base, None if d is Zero else dense(d).reshape(-1, *shape)


def affine(dhat: Tensor | None, hat: Tensor, gamma: Any, dgamma: Any, dbeta: Any) -> Tensor:
    """d(hat * gamma + beta) from the differences that are not None."""
    total: Tensor | None = None
    if dhat is not None:
        total = dhat if gamma is None else dhat * gamma
    if dgamma is not None:
        term = dgamma * (hat if dhat is None else hat + dhat)
        total = term if total is None else total + term
    if dbeta is not None:
        total = dbeta if total is None else total + dbeta
    assert total is not None
    return total


@rule(
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_no_training.default,
    aten.native_batch_norm.default,
    family="mixes",
)
def batch_norm(block: Block, node: fx.Node) -> tuple[Carrier, ...]:
    """x [N, C, *spatial]; batch statistics in training, running ones otherwise. Channels never mix."""
    if block.saved(node, "read", lambda: _statistics_are_read(node, block.base.graph.loss)):
        return block.fallback(node)
    norm = BatchNorm.of(node)
    assert norm is not None
    x, gamma, beta, mean, var, train, eps = (
        norm.input,
        norm.weight,
        norm.bias,
        norm.mean,
        norm.var,
        norm.training,
        norm.eps,
    )
    if block.d(mean) is not Zero or block.d(var) is not Zero:
        return block.fallback(node)
    z = block.exact(x)
    dims = [0, *range(2, z.dim())]
    vector = [1, -1, *[1] * (z.dim() - 2)]

    def make() -> tuple[Tensor, Tensor, Tensor]:
        zc, v = centred(z, dims) if train else (z - block.exact(mean).reshape(vector), block.exact(var).reshape(vector))
        return block.base_rounded(zc), v, block.base_rounded(zc / (v + eps).sqrt())

    zc, v, hat = block.saved(node, "norm", make)
    out = _one_channel_norm(block, x, gamma, beta, zc, v, hat, train, eps)
    if out is None:
        d = block.d(x)
        dhat = None
        if d is not Zero:
            values = dense(d)
            dhat = (
                normalised(values, zc, v, eps, [k + 1 for k in dims])
                if train
                else values * (1 / (v + eps).sqrt()).to(values.dtype)
            )
        shape = [1, z.shape[1], *vector[2:]]
        g, dg = _vector(block, gamma, shape)
        _, db = _vector(block, beta, shape)
        total = affine(dhat, hat, g, dg, db)
        out = Dense(total.expand(block.count, *z.shape))
    return (out, *[Zero] * (len(block.exact(node)) - 1))


def _statistics_are_read(node: fx.Node, loss: fx.Node) -> bool:
    """Whether the loss depends on a batch norm's new running statistics: then they are more than a buffer update.

    The next use of the same layer in training reads them too, but only to update them again.
    """
    ahead = [(user, node) for user in node.users if user.args[1] != 0]
    seen: set[tuple[fx.Node, fx.Node]] = set()
    while ahead:
        at, source = ahead.pop()
        if at is loss:
            return True
        if (at, source) in seen:
            continue
        seen.add((at, source))
        norm = BatchNorm.of(at)
        updates = norm is not None and norm.updates and norm.training and source in (norm.mean, norm.var)
        updates = updates and source not in (norm.input, norm.weight, norm.bias)
        ahead += [(user, at) for user in at.users if not updates or user.args[1] != 0]
    return False


def _one_channel_norm(
    block: Block, x: Any, gamma: Any, beta: Any, zc: Tensor, var: Tensor, hat: Tensor, train: bool, eps: float
) -> Carrier | None:
    """One channel in, the same channel out; None when the differences do not lie in one channel."""
    d, dg, db = block.d(x), block.d(gamma), block.d(beta)
    moving = [c for c in (d, dg, db) if c is not Zero]
    if len(moving) != 1:
        return None
    shape = tuple(block.exact(x).shape)
    if isinstance(d, OneChannel) and d.dim == 1:
        channel = d.channel
        dims = list(range(1, d.values.dim()))
        v = var.reshape(-1)[channel].reshape(-1, *[1] * len(dims))
        if train:
            values = normalised(d.values, select(zc, 1, channel), v, eps, dims)
        else:
            values = d.values * (1 / (v + eps).sqrt()).to(d.values.dtype)
        if gamma is not None:
            values = values * block.low(gamma)[channel].reshape(v.shape)
        return OneChannel(shape, 1, channel, values)
    if isinstance(dg, OneEntry):
        channel = dg.index[:, 0]
        values = select(hat, 1, channel) * dg.step.reshape(-1, *[1] * (len(shape) - 1))
        return OneChannel(shape, 1, channel, values)
    if isinstance(db, OneEntry):
        rest = [shape[0], *shape[2:]]
        values = db.step.reshape(-1, *[1] * len(rest)).expand(-1, *rest)
        return OneChannel(shape, 1, db.index[:, 0], values)
    return None


def layer_base(block: Block, norm: LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Of the input of a layer norm: centred, its variance in float64, and normalised."""
    z = block.exact(norm.input)
    dims = list(range(z.dim() - len(norm.shape), z.dim()))

    def make() -> tuple[Tensor, Tensor, Tensor]:
        zc, v = centred(z, dims)
        return block.base_rounded(zc), v, block.base_rounded(zc / (v + norm.eps).sqrt())

    return block.saved(norm.node, "norm", make)


@rule(aten.native_layer_norm.default, family="mixes")
def layer_norm(block: Block, node: fx.Node) -> tuple[Carrier, ...]:
    norm = LayerNorm.of(node)
    assert norm is not None
    x, gamma, beta, eps = norm.input, norm.weight, norm.bias, norm.eps
    z = block.exact(x)
    first = z.dim() - len(norm.shape)
    zc, v, hat = layer_base(block, norm)
    d = block.d(x)
    vectors = [c for c in (block.d(gamma), block.d(beta)) if c is not Zero]
    if d is Zero and len(vectors) == 1 and isinstance(entry := vectors[0], OneEntry) and len(entry.shape) == 1:
        channel, rest = entry.index[:, 0], z.shape[:-1]
        step = entry.step.reshape(-1, *[1] * len(rest))
        values = step.expand(-1, *rest) if block.d(gamma) is Zero else select(hat, z.dim() - 1, channel) * step
        return OneChannel(tuple(z.shape), z.dim() - 1, channel, values), Zero, Zero
    if d is not Zero and not vectors:
        weight = None if gamma is None else block.low(gamma).reshape(-1)
        return Dense(_row_norm(dense(block.raw(x)), zc, v, weight, eps, block.operands)), Zero, Zero
    dhat = None if d is Zero else _row_norm(dense(d), zc, v, None, eps, block.dtype)
    shape = list(z.shape[first:])
    g, dg = _vector(block, gamma, shape)
    _, db = _vector(block, beta, shape)
    if dg is not None:
        dg = dg.reshape(len(dg), *[1] * first, *shape)
    if db is not None:
        db = db.reshape(len(db), *[1] * first, *shape)
    total = affine(dhat, hat, g, dg, db)
    return Dense(total.expand(block.count, *z.shape)), Zero, Zero


def _row_norm(dz: Tensor, zc: Tensor, var: Tensor, gamma: Tensor | None, eps: Any, out_dtype: torch.dtype) -> Tensor:
    """The norm's difference over rows: zc [R.., M..] as var [R.., 1..] divides it, dz [P, *zc.shape]."""
    rows = zc.reshape(var.numel(), -1)
    dz = dz.to(zc.dtype) if dz.dtype is torch.float64 else dz
    out = dzkernels.layer_norm_difference(
        dz.reshape(len(dz), *rows.shape), rows, var.reshape(-1), gamma, eps=float(eps), out_dtype=out_dtype
    )
    return out.reshape(dz.shape)


@rule(aten.native_group_norm.default, family="mixes")
def group_norm(block: Block, node: fx.Node) -> tuple[Carrier, ...]:
    """x [N, C, *spatial], statistics over each of ``groups`` groups of channels of each sample."""
    x, gamma, beta, n, c, _, groups, eps = node.args
    z = block.exact(x)
    split = (n, groups, -1)

    def make() -> tuple[Tensor, Tensor, Tensor]:
        zc, v = centred(z.reshape(split), [2])
        return zc.to(block.dtype), v, block.base_rounded((zc / (v + eps).sqrt()).reshape(z.shape))

    zc, v, hat = block.saved(node, "norm", make)
    d = block.d(x)
    dhat = None
    if d is not Zero:
        values = dense(d)
        dhat = _row_norm(values.reshape(len(values), *split), zc, v, None, eps, block.dtype).reshape(values.shape)
    vector = [1, c, *[1] * (z.dim() - 2)]
    g, dg = _vector(block, gamma, vector)  # type: ignore[arg-type]
    _, db = _vector(block, beta, vector)  # type: ignore[arg-type]
    total = affine(dhat, hat, g, dg, db)
    return Dense(total.expand(block.count, *z.shape)), Zero, Zero
