"""The arguments that kernels take for a norm fused with them, and the moments they return for the norm after them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowNorm(NamedTuple):
    """The layer norm before a linear layer, as in :func:`layer_norm_difference`.

    zc     [R, M]       base input minus its mean over the row
    var    [R] float64  mean(zc^2) of the row
    gamma  [M]          weight; None means 1
    eps                 added to the variance
    """

    zc: Tensor
    var: Tensor
    gamma: Tensor | None
    eps: float


def moments(delta: Tensor, zc: Tensor) -> Tensor:
    """The moments of a difference [P, N, C, H, W] that determine a batch norm in training: [P, 2, C] float64.

    moments[p, 0] = mean(delta[p])
    moments[p, 1] = mean(2 zc d + d^2), d = delta[p] - mean(delta[p]): the change of the variance

    zc [N, C, H, W] is the base input of the norm minus its mean; means are over N, H, W of each channel.
    """
    d = delta.double()
    mean = d.mean((1, 3, 4))
    d = d - mean[:, None, :, None, None]
    return torch.stack([mean, (d * (2 * zc.double() + d)).mean((1, 3, 4))], 1)


def before_relu(zc: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Base output of a batch norm before its ReLU, [N, C, H, W] float64."""
    scale = gamma / (var + eps).sqrt()
    return scale[:, None, None] * zc.double() + beta[:, None, None]


def window_gap(y: Tensor, pooled: Tensor, pool: int) -> Tensor:
    """max(y, 0) [N, C, H, W] minus `pooled`, the maximum of its pooling window: at most 0; 0 outside of windows."""
    rows, columns = pooled.shape[2:]
    gap = y.clamp(min=0)
    gap[:, :, rows * pool :] = 0
    gap[..., columns * pool :] = 0
    windows = gap[..., : rows * pool, : columns * pool].unflatten(2, (rows, pool)).unflatten(4, (columns, pool))
    windows -= pooled[:, :, :, None, :, None]
    return gap
