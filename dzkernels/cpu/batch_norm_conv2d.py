"""Composed of two kernels, the norm and the convolution: fusing them does not pay on a CPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._norm import moments as moments_of
from . import dense_batch_norm

Size = tuple[int, int]


def run(
    delta: Tensor, zc: Tensor, var: Tensor, gamma: Tensor, weight: Tensor, *, eps: float, training: bool,
    residual: Tensor | None, residual_channel: Tensor | None, y: Tensor | None, moments: Tensor | None, stride: Size,
    padding: Size, dilation: Size, next_zc: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    moved = dense_batch_norm.run(
        delta, zc, var, gamma, eps=eps, training=training, residual=residual, residual_channel=residual_channel, y=y,
        pool=1, gap=None, out_dtype=weight.dtype, moments=moments,
    )  # fmt: skip
    out = F.conv2d(moved.flatten(0, 1), weight, None, stride, padding, dilation).unflatten(0, delta.shape[:2])
    out = out.movedim(2, -1).contiguous().movedim(-1, 2)
    return out if next_zc is None else (out, moments_of(out, next_zc))
