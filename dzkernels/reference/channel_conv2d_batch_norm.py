from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._norm import before_relu, window_gap
from . import channel_conv2d, dense_batch_norm

Size = tuple[int, int]


def run(
    delta: Tensor, channel: Tensor, weight: Tensor, zc: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, *,
    stride: Size, padding: Size, dilation: Size, eps: float, training: bool, relu: bool, pool: int, mean: bool,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    moved = channel_conv2d.run(
        delta, channel, weight, stride=stride, padding=padding, dilation=dilation, groups=1, out_dtype=torch.float64
    )
    y = before_relu(zc, var, gamma, beta, eps) if relu else None
    gap = None if y is None or pool == 1 else window_gap(y, F.max_pool2d(y.clamp(min=0), pool), pool)
    out = dense_batch_norm.run(
        moved, zc, var, gamma, eps=eps, training=training, residual=None, residual_channel=None, y=y, pool=pool,
        gap=gap, out_dtype=torch.float64, moments=None,
    )  # fmt: skip
    out = out.mean((3, 4)) if mean else out
    return out.to(out_dtype)
