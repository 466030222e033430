from __future__ import annotations

import torch
from torch import Tensor

from ..reference import channel_batch_norm as reference
from . import launch


def run(
    delta: Tensor, channel: Tensor, x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, *, eps: float, training: bool,
    y: Tensor | None, pool: int, gap: Tensor | None,
) -> Tensor:  # fmt: skip
    if not training or pool > 1:  # the kernel supports neither
        return reference.run(delta, channel, x, mean, var, gamma, eps=eps, training=training, y=y, pool=pool, gap=gap)
    delta, channel = delta.contiguous(), channel.contiguous()
    mean, var, gamma = mean.contiguous(), var.contiguous(), gamma.contiguous()
    out = torch.empty(delta.shape, dtype=torch.float32, device=delta.device)
    launch(
        __name__, delta, channel, x, mean, var, gamma, y, out, eps,
        *delta.shape, *x.stride(), *(y.stride() if y is not None else (0, 0, 0, 0)),
    )  # fmt: skip
    return out
