"""Pooling and dropout. Average pooling is linear; the maximum goes by the winning element."""

from __future__ import annotations

import itertools
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..carriers import Carrier, Dense, OneChannel, Zero, dense, select
from .registry import Follow, aten, linear, rule

if TYPE_CHECKING:
    from ..block import Block


def _apart(nd: int) -> Follow:
    """Pooling works on the last ``nd`` dimensions; those before it stay as they are."""
    return lambda node, dim: dim if dim < node.args[0].meta["val"].dim() - nd else None  # type: ignore[union-attr]


linear(aten.avg_pool1d.default, follow=_apart(1))
linear(aten.avg_pool2d.default, follow=_apart(2))
linear(aten.avg_pool3d.default, follow=_apart(3))
linear(aten._adaptive_avg_pool2d.default, follow=_apart(2))
linear(aten._adaptive_avg_pool3d.default, follow=_apart(3))
linear(aten.adaptive_avg_pool1d.default, follow=_apart(1))


def _windows(node: fx.Node, nd: int, sizes: list[int], outs: list[int]) -> Tensor:
    """Flat input position of every element of every pooling window, [outputs, elements]; -1 is padding."""

    def of(position: int, default: list[int]) -> list[int]:
        given = node.args[position] if len(node.args) > position else None
        values = list(given) if given else default  # type: ignore[call-overload]
        return values * (nd // len(values))

    kernel = of(1, [])
    stride, padding, dilation = of(2, kernel), of(3, [0]), of(4, [1])
    axes = []
    for k in range(nd):
        start = torch.arange(outs[k]) * stride[k] - padding[k]
        at = start[:, None] + torch.arange(kernel[k]) * dilation[k]
        axes.append(torch.where((at >= 0) & (at < sizes[k]), at, -1))
    flat = torch.zeros((1, 1), dtype=torch.int64)
    for at, size in zip(axes, sizes, strict=True):
        outer = flat[:, None, :, None]
        inner = at[None, :, None, :]
        joined = torch.where((outer < 0) | (inner < 0), -1, outer * size + inner)
        flat = joined.flatten(0, 1).flatten(1, 2)
    return flat


def _adaptive_windows(nd: int, sizes: list[int], outs: list[int]) -> Tensor:
    """The windows of adaptive pooling: [floor(i n / m), ceil((i + 1) n / m)) along every axis."""
    spans = [[(i * n // m, -(-(i + 1) * n // m)) for i in range(m)] for n, m in zip(sizes, outs, strict=True)]
    rows = []
    for box in itertools.product(*spans):
        cells = list(itertools.product(*(range(a, b) for a, b in box)))
        rows.append([_ravel(cell, sizes) for cell in cells])
    longest = max(map(len, rows))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows])


def _ravel(cell: tuple[int, ...], sizes: list[int]) -> int:
    flat = 0
    for at, size in zip(cell, sizes, strict=True):
        flat = flat * size + at
    return flat


@rule(
    aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
    family="mixes",
)
def max_pool(block: Block, node: fx.Node) -> Any:
    """Each window's winner after the move: max over k of (z_k - max z) + dz_k. Indices, if read, take the slow way."""
    if any(user.target is operator.getitem and user.args[1] == 1 and user.users for user in node.users):
        return block.fallback(node)
    x = node.args[0]
    result = block.exact(node)
    out = result[0] if isinstance(result, tuple | list) else result
    z = block.exact(x)
    adaptive = "adaptive" in str(node.target)
    nd = 3 if "3d" in str(node.target) else 2
    lead = z.dim() - nd
    sizes, outs = list(z.shape[lead:]), list(out.shape[lead:])

    def make() -> tuple[Tensor, Tensor]:
        index = _adaptive_windows(nd, sizes, outs) if adaptive else _windows(node, nd, sizes, outs)
        index = index.to(z.device)
        picked = z.flatten(lead)[..., index.clamp(min=0)]
        picked = picked.masked_fill(index < 0, float("-inf"))
        return index.clamp(min=0), (picked - out.flatten(lead).unsqueeze(-1)).to(block.dtype)

    index, gap = block.saved(node, "windows", make)
    d = block.d(x)
    carrier: Carrier
    if isinstance(d, OneChannel) and d.dim == lead - 1:
        moved = select(gap, d.dim, d.channel) + d.values.flatten(lead)[..., index]
        carrier = OneChannel(tuple(out.shape), d.dim, d.channel, moved.amax(-1).unflatten(-1, outs))
    else:
        values = dense(d).flatten(lead + 1)[..., index]
        carrier = Dense((gap + values).amax(-1).unflatten(-1, outs))
    return (carrier, Zero) if isinstance(result, tuple | list) else carrier


@rule(aten.native_dropout.default, family="pointwise")
def dropout(block: Block, node: fx.Node) -> tuple[Carrier, Carrier]:
    """The base pass drew the mask; every query reuses it."""
    x, p, train = (*node.args, True)[:3]
    d = block.d(x)
    if not train:
        return d, Zero
    keep = block.saved(
        node,
        "keep",
        lambda: block.base_rounded(block.exact(node)[1].double() * (0.0 if p == 1 else 1 / (1 - p))),  # type: ignore[operator]
    )
    if isinstance(d, OneChannel):
        return OneChannel(d.shape, d.dim, d.channel, d.values * select(keep, d.dim, d.channel)), Zero
    return Dense(dense(d) * keep), Zero
