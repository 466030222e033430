"""Linear layers, convolutions and matrix products: bilinear in input and weight, both of which may move.

    (a + da)(w + dw) - a w = da w + (a + da) dw

A coordinate of the weight touches one output channel, and a difference in one input channel needs one column of the
weight: neither is ever a full product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

import dzkernels

from .. import carriers
from ..carriers import Carrier, Dense, OneChannel, OneEntry, Zero, dense, one_channel, without
from ..graph.nodes import Convolution
from .registry import aten, rule

if TYPE_CHECKING:
    from ..block import Block


def _moved(block: Block, arg: Any, d: Any) -> Tensor:
    """Base + difference, [P or 1, *shape], in the query dtype."""
    base = block.low(arg).unsqueeze(0)
    return base if d is Zero else base + dense(d)


# --- x @ w, with w [K, M] shared by all samples; linear is the same with w [M, K]


@rule(aten.linear.default, family="mixes")
def linear(block: Block, node: fx.Node) -> Carrier:
    x, w, *bias = node.args
    out = _shared_product(block, node, x, w, transposed=True)
    return carriers.add(out, _bias(block, node, bias[0], -1)) if bias and bias[0] is not None else out


@rule(aten.mm.default, family="mixes", data=(0, 1))
def mm(block: Block, node: fx.Node) -> Carrier:
    return _shared_product(block, node, node.args[0], node.args[1], transposed=False)


@rule(aten.addmm.default, family="mixes", data=(1, 2))
def addmm(block: Block, node: fx.Node) -> Carrier:
    bias, x, w = node.args[:3]
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    out = _times(_shared_product(block, node, x, w, transposed=False), alpha)
    return carriers.add(out, _times(_spread(block.d(bias), tuple(block.exact(node).shape)), beta))


def _times(d: Carrier, factor: Any) -> Carrier:
    return d if d is Zero or factor == 1 else Dense(dense(d) * factor)


@rule(aten.mv.default, family="mixes", data=(0, 1))
def mv(block: Block, node: fx.Node) -> Carrier:
    a, v = node.args
    da, dv = block.d(a), block.d(v)
    total: Carrier = Zero
    if da is not Zero:
        total = Dense(dense(da) @ block.low(v))
    if dv is not Zero:
        total = carriers.add(total, Dense((_moved(block, a, da) @ dense(dv).unsqueeze(-1)).squeeze(-1)))
    return total


def _shared_product(block: Block, node: fx.Node, x: Any, w: Any, *, transposed: bool) -> Carrier:
    """The difference of x @ w (or x @ w^T): x [..., K], w [K, M] or [M, K] -> [..., M]."""
    shape = tuple(block.exact(node).shape)
    dx, dw = block.d(x), block.d(w)
    total: Carrier = Zero
    if dx is not Zero:
        weight = block.low(w)
        weight = weight if transposed else weight.t()  # [M, K] from here on
        last = len(shape) - 1
        if isinstance(dx, OneEntry):
            dx = one_channel(dx, last)
        if isinstance(dx, OneChannel) and dx.dim == last:
            column = weight.index_select(1, dx.channel).t()  # [P, M]
            column = column.reshape(len(column), *[1] * last, -1)
            total = Dense(dx.values.unsqueeze(-1) * column)
        else:
            total = Dense(block.product(F.linear, dense(block.raw(x)), weight))
    if dw is not Zero:
        total = carriers.add(total, _weight_moves(block, x, dx, dw, shape, transposed))
    return total


def _weight_moves(block: Block, x: Any, dx: Any, dw: Any, shape: tuple[int, ...], transposed: bool) -> Carrier:
    """(x + dx) @ dw."""
    if isinstance(dw, OneEntry):
        k, m = (1, 0) if transposed else (0, 1)
        last = len(shape) - 1
        if dx is Zero:
            column = block.columns(x).index_select(0, dw.index[:, k])  # [P, ...]
        else:
            moved = _moved(block, x, dx)
            rows = torch.arange(len(moved), device=moved.device)
            column = moved.movedim(-1, 1)[rows, dw.index[:, k]]
        step = dw.step.reshape(-1, *[1] * last)
        return OneChannel(shape, last, dw.index[:, m], column * step)
    weight = dense(dw)  # [P, K, M] or [P, M, K]
    weight = weight.transpose(1, 2) if transposed else weight
    moved = _moved(block, x, dx)
    if len(moved) == 1:  # one input for all perturbations: a single product with the weights side by side
        p, k, m = weight.shape
        flat = block.product(torch.matmul, moved[0], weight.permute(1, 0, 2).reshape(k, p * m))
        return Dense(flat.reshape(*shape[:-1], p, m).movedim(-2, 0))
    rows = moved.reshape(len(moved), -1, moved.shape[-1])
    return Dense(block.product(torch.bmm, rows, weight).reshape(len(weight), *shape))


def _bias(block: Block, node: fx.Node, bias: Any, dim: int) -> Carrier:
    """A vector added along ``dim``."""
    d = block.d(bias)
    shape = tuple(block.exact(node).shape)
    dim %= len(shape)
    if d is Zero:
        return Zero
    if isinstance(d, OneEntry):
        rest = without(shape, dim)
        return OneChannel(shape, dim, d.index[:, 0], d.step.reshape(-1, *[1] * len(rest)).expand(-1, *rest))
    values = dense(d)
    view = [len(values), *[1] * len(shape)]
    view[dim + 1] = values.shape[1]
    return Dense(values.reshape(view).expand(-1, *shape))


def _spread(d: Any, shape: tuple[int, ...]) -> Carrier:
    """A difference broadcast to ``shape`` from the right."""
    if d is Zero:
        return Zero
    values = dense(d)
    lead = len(shape) - (values.dim() - 1)
    return Dense(values.reshape(len(values), *[1] * lead, *values.shape[1:]).expand(-1, *shape))


# --- batched products: both sides are activations


@rule(aten.bmm.default, aten.matmul.default, family="mixes", data=(0, 1))
def bmm(block: Block, node: fx.Node) -> Carrier:
    return _batched_product(block, *node.args)


def _batched_product(block: Block, a: Any, b: Any) -> Carrier:
    da, db = block.d(a), block.d(b)
    total: Tensor | None = None
    if da is not Zero:
        total = block.product(torch.matmul, dense(block.raw(a)), block.low(b))
    if db is not Zero:
        right = block.product(torch.matmul, _moved(block, a, da), dense(block.raw(b)))
        total = right if total is None else total.to(block.dtype) + right
    return Zero if total is None else Dense(total)


@rule(aten._trilinear.default, family="mixes", data=(0, 1, 2))
def trilinear(block: Block, node: fx.Node) -> Carrier:
    """nn.Bilinear: sum of a b c after each was given dimensions of size 1. One factor moves after the other."""
    *factors, sums = [*node.args[:3], node.args[6]]

    def placed(values: Tensor, dims: Any) -> Tensor:
        for k in dims:
            values = values.unsqueeze(k + 1)
        return values

    bases = [placed(block.low(a).unsqueeze(0), dims) for a, dims in zip(factors, node.args[3:6], strict=True)]
    total: Tensor | None = None
    for i, (arg, dims) in enumerate(zip(factors, node.args[3:6], strict=True)):
        if (d := block.d(arg)) is not Zero:
            moved = placed(dense(d), dims)
            others = [b for k, b in enumerate(bases) if k != i]
            term = (moved * others[0] * others[1]).sum([k + 1 for k in sums])  # type: ignore[union-attr]
            total = term if total is None else total + term
            bases[i] = bases[i] + moved
    assert total is not None
    return Dense(total)


@rule(aten.baddbmm.default, family="mixes", data=(0, 1, 2))
def baddbmm(block: Block, node: fx.Node) -> Carrier:
    bias, a, b = node.args[:3]
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    product = _times(_batched_product(block, a, b), alpha)
    return carriers.add(product, _times(_spread(block.d(bias), tuple(block.exact(node).shape)), beta))


# --- convolution, any number of dimensions, plain and transposed

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Geometry:
    """The constants of a convolution node; called as ``geometry(images, weight, groups)``."""

    def __init__(self, node: Any) -> None:
        conv = Convolution.of(node)
        assert conv is not None
        self.nd = len(conv.stride)
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.transposed, self.output_padding, self.groups = conv.transposed, conv.output_padding, conv.groups

    def __call__(self, images: Tensor, weight: Tensor, groups: int) -> Tensor:
        if self.transposed:
            return _TRANSPOSED[self.nd](
                images, weight, None, self.stride, self.padding, self.output_padding, groups, self.dilation
            )
        return _CONV[self.nd](images, weight, None, self.stride, self.padding, self.dilation, groups)

    def dense(self, images: Tensor, weight: Tensor) -> Tensor:
        """Images [P, N, C, *spatial] of P perturbations."""
        if self.nd == 2 and not self.transposed:
            return dzkernels.dense_conv2d(images, weight, **self.spacing)
        return self(images.flatten(0, 1), weight, self.groups).unflatten(0, images.shape[:2])

    def has_kernels(self, dtype: torch.dtype) -> bool:
        """Whether dzkernels' one-channel convolutions are made for it."""
        return self.nd == 2 and not self.transposed and dtype is torch.float32

    @property
    def spacing(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}


@rule(aten.convolution.default, family="mixes")
def convolution(block: Block, node: Any) -> Carrier:
    """x [N, C, *spatial] with w [O, C / groups, *kernel], or [C, O / groups, *kernel] when transposed."""
    x, w, bias = node.args[:3]
    conv = Geometry(node)
    shape = tuple(block.exact(node).shape)
    dx, dw = block.raw(x), block.d(w)
    total: Carrier = Zero
    if dx is not Zero:
        if isinstance(dx, OneChannel) and dx.dim == 1:
            total = _one_channel_in(block, conv, dx, block.low(w), shape)
        else:
            total = Dense(block.product(conv.dense, dense(dx), block.low(w)))
    if dw is not Zero:
        total = carriers.add(total, _kernel_moves(block, conv, x, dw, shape))
    return carriers.add(total, _bias(block, node, bias, 1)) if bias is not None else total


def _one_channel_in(block: Block, conv: Geometry, dx: OneChannel, weight: Tensor, shape: tuple[int, ...]) -> Carrier:
    """One input channel moves: only its column of the weight takes part, and only its group's outputs move."""
    groups = conv.groups
    if groups == 1 and conv.has_kernels(block.dtype):
        return Dense(dzkernels.channel_conv2d(dx.values, dx.channel, weight, **conv.spacing))
    per_group, outs = dx.shape[1] // groups, shape[1] // groups
    group, inner = dx.channel // per_group, dx.channel % per_group
    if conv.transposed:
        kernels = weight.index_select(0, dx.channel)  # [P, O / groups, *k]
        taken = kernels
    else:
        kernels = weight.unflatten(0, (groups, outs))[group, :, inner]
        taken = kernels.flatten(0, 1).unsqueeze(1)  # [P * O / groups, 1, *k]
    out = conv(dx.values.transpose(0, 1), taken, len(kernels))  # every perturbation is a group of its own
    out = out.unflatten(1, kernels.shape[:2]).transpose(0, 1)  # [P, N, O / groups, *s]
    if groups == 1:
        return Dense(out)
    if outs == 1:
        return OneChannel(shape, 1, group, out.squeeze(2))
    full = carriers.empty_dense(len(out), shape, out).zero_()
    rows = torch.arange(len(out), device=out.device)
    full.unflatten(2, (groups, outs)).transpose(1, 2)[rows, group] = out
    return Dense(full)


def _kernel_moves(block: Block, conv: Geometry, x: Any, dw: Any, shape: tuple[int, ...]) -> Carrier:
    """(x + dx) convolved with the difference of the weight."""
    dx, groups = block.d(x), conv.groups
    if isinstance(dw, OneEntry):
        if dx is Zero and conv.has_kernels(block.dtype):
            values = dzkernels.conv2d_tap(
                block.planes(x), dw.index, dw.step, kernel=dw.shape[2:], out_channels=shape[1], **conv.spacing
            )
            return OneChannel(shape, 1, dw.index[:, 0], values)
        moved = _moved(block, x, dx)
        if conv.transposed:
            channel = dw.index[:, 0]
            out = channel // (moved.shape[2] // groups) * dw.shape[1] + dw.index[:, 1]
        else:
            out = dw.index[:, 0]
            channel = out // (shape[1] // groups) * dw.shape[1] + dw.index[:, 1]
        if len(moved) == 1:
            images = moved[0].index_select(1, channel)  # [N, P, *s]
        else:
            images = moved.transpose(1, 2)[torch.arange(len(moved), device=moved.device), channel].transpose(0, 1)
        inside = torch.cat([torch.zeros_like(dw.index[:, :1]), dw.index[:, 2:]], 1)
        kernels = dense(OneEntry((1, *dw.shape[2:]), inside, dw.step))  # [P, 1, *k]
        return OneChannel(shape, 1, out, conv(images, kernels, len(kernels)).transpose(0, 1))
    kernels, moved = dense(dw), _moved(block, x, dx)
    count = len(kernels)
    if len(moved) == 1 and groups == 1 and not conv.transposed:
        out = block.product(lambda a, k: conv(a, k, 1), moved[0], kernels.flatten(0, 1))
    else:
        images = moved.expand(count, *moved.shape[1:]).transpose(0, 1).flatten(1, 2)  # [N, P * C, *s]
        out = block.product(lambda a, k: conv(a, k, count * groups), images, kernels.flatten(0, 1))
    return Dense(out.unflatten(1, (count, shape[1])).transpose(0, 1))


@rule(aten.embedding.default, family="rearranges")
def embedding(block: Block, node: fx.Node) -> Carrier:
    """Rows of w [V, M] picked by an index tensor. A coordinate (v, m) moves feature m wherever v was picked."""
    w, index = node.args[:2]
    if block.d(index) is not Zero:
        return block.fallback(node)
    d, picked = block.d(w), block.exact(index)
    if isinstance(d, OneEntry):
        hits = picked.unsqueeze(0) == d.index[:, 0].reshape(-1, *[1] * picked.dim())
        values = hits * d.step.reshape(-1, *[1] * picked.dim())
        return OneChannel(tuple(block.exact(node).shape), picked.dim(), d.index[:, 1], values)
    return Dense(dense(d)[:, picked])


@rule(aten._embedding_bag.default, aten._embedding_bag_forward_only.default, family="mixes")
def embedding_bag(block: Block, node: fx.Node) -> Any:
    """Sums, means or maxima of the rows of w [V, M] that each bag picks; sums with a weight for each pick, if given.

    A coordinate (v, m) moves feature m of the bags that pick v.
    """
    given = (*node.args, *(False, 0, False, None, False, -1)[len(node.args) - 3 :])
    w, index, offsets, _, mode, _, weights, _, padding = given
    if any(block.d(n) is not Zero for n in node.all_input_nodes if n is not w):
        return block.fallback(node)
    picked, starts = block.exact(index), block.exact(offsets)
    shape = tuple(block.exact(node)[0].shape)
    bag = torch.searchsorted(starts, torch.arange(len(picked), device=picked.device), right=True) - 1
    counts = picked != padding
    d = block.d(w)
    # [P, picks] of one feature, or [P, picks, M]
    rows = (picked == d.index[:, :1]) * d.step[:, None] if isinstance(d, OneEntry) else dense(d)[:, picked]
    if mode == 2:
        base = block.exact(w)[picked].double()
        base = base[:, d.index[:, 1]].T if isinstance(d, OneEntry) else base.unsqueeze(0)
        total = _maxima(base + rows, counts, bag, shape[0]) - _maxima(base, counts, bag, shape[0])
    else:
        factor = counts.to(rows.dtype) if weights is None else counts * block.exact(weights).to(rows.dtype)
        rows = rows * factor.reshape(-1, *[1] * (rows.dim() - 2))
        total = rows.new_zeros((len(rows), shape[0], *rows.shape[2:])).index_add(1, bag, rows)
        if mode == 1:
            sizes = rows.new_zeros(shape[0]).index_add(0, bag, counts.to(rows.dtype)).clamp(min=1)
            total = total / sizes.reshape(-1, *[1] * (rows.dim() - 2))
    values = total.to(block.dtype)
    carrier = OneChannel(shape, 1, d.index[:, 1], values) if isinstance(d, OneEntry) else Dense(values)
    return carrier, *[Zero] * (len(block.exact(node)) - 1)


def _maxima(rows: Tensor, counts: Tensor, bag: Tensor, bags: int) -> Tensor:
    """The maximum of each bag over the rows [P, picks, ...] that count; 0 for an empty bag."""
    rows = rows.masked_fill(~counts.reshape(-1, *[1] * (rows.dim() - 2)), -torch.inf)
    at = bag.reshape(-1, *[1] * (rows.dim() - 2)).expand(rows.shape)
    found = rows.new_full((len(rows), bags, *rows.shape[2:]), -torch.inf).scatter_reduce(1, at, rows, "amax")
    return torch.where(found == -torch.inf, 0.0, found)
