from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._norm import before_relu, window_gap
from . import channel_batch_norm, conv2d_tap

Size = tuple[int, int]


def run(
    x: Tensor, coord: Tensor, step: Tensor, zc: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, *, kernel: Size,
    stride: Size, padding: Size, dilation: Size, groups: int, eps: float, training: bool, relu: bool, pool: int,
) -> Tensor:  # fmt: skip
    moved = conv2d_tap.run(
        x, coord, step, kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
        out_channels=zc.shape[1],
    )  # fmt: skip
    y = before_relu(zc, var, gamma, beta, eps) if relu else None
    gap = None if y is None or pool == 1 else window_gap(y, F.max_pool2d(y.clamp(min=0), pool), pool)
    return channel_batch_norm.run(
        moved, coord[:, 0], zc, var.new_zeros(var.shape), var, gamma, eps=eps, training=training, y=y, pool=pool,
        gap=gap,
    )  # fmt: skip
