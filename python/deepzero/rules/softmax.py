"""Softmax and log-softmax, through expm1 and log1p."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

import dzkernels

from ..carriers import Carrier, Dense, dense, occurs
from .registry import aten, rule

if TYPE_CHECKING:
    from ..block import Block


def log_sum_exp(dz: Tensor, p: Tensor, dim: int) -> Tensor:
    """log(sum_k p_k e^dz_k) with p the base softmax: how much the log of the partition sum moves, kept dimension."""
    small = torch.log1p((p * torch.expm1(dz)).sum(dim, keepdim=True))
    top = dz.amax(dim, keepdim=True)
    far = dz.abs().amax(dim, keepdim=True) > 1
    if occurs(far):
        shifted = top + (p * torch.exp(dz - top)).sum(dim, keepdim=True).log()
        return torch.where(far, shifted, small)
    return small


def _probabilities(block: Block, node: fx.Node) -> Tensor:
    z, dim = block.exact(node.args[0]), node.args[1]
    return block.saved(node, "softmax", lambda: torch.softmax(z, dim))  # type: ignore[no-any-return, arg-type]


@rule(aten._log_softmax.default, family="mixes")
def log_softmax(block: Block, node: fx.Node) -> Carrier:
    """In float64: what follows is the loss, in which almost everything cancels."""
    d = dense(block.d(node.args[0])).double()
    dim = int(node.args[1]) % (d.dim() - 1) + 1  # type: ignore[call-overload]
    return Dense(d - log_sum_exp(d, _probabilities(block, node), dim))


@rule(aten._softmax.default, family="mixes")
def softmax(block: Block, node: fx.Node) -> Carrier:
    d = dense(block.d(node.args[0])).to(block.dtype)
    dim = int(node.args[1]) % (d.dim() - 1)  # type: ignore[call-overload]
    p = block.saved(node, "rows", lambda: _rows(_probabilities(block, node), dim).to(block.dtype))
    rows = d.movedim(dim + 1, -1)
    out = dzkernels.softmax_difference(rows.reshape(len(d), *p.shape), p)
    return Dense(out.reshape(rows.shape).movedim(-1, dim + 1))


def _rows(value: Tensor, dim: int) -> Tensor:
    """[R, K] with dimension ``dim`` last."""
    moved = value.movedim(dim, -1)
    return moved.reshape(-1, moved.shape[-1])


@rule(aten.logcumsumexp.default, family="mixes")
def log_cumulative_sum_exp(block: Block, node: fx.Node) -> Carrier:
    """L_k = log(e^L_(k-1) + e^z_k), one element after the other."""
    d, z, before = dense(block.d(node.args[0])), block.exact(node.args[0]), block.exact(node)
    dim = int(node.args[1]) % z.dim()  # type: ignore[call-overload]
    rows = [d.select(dim + 1, 0)]
    for k in range(1, z.shape[dim]):
        pair = torch.stack([before.select(dim, k - 1), z.select(dim, k)])
        moved = torch.stack([rows[-1], d.select(dim + 1, k)], 1)
        rows.append(log_sum_exp(moved, block.base_rounded(torch.softmax(pair, 0)), 1).squeeze(1))
    return Dense(torch.stack(rows, dim + 1))
