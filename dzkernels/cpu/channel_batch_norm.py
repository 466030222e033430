from __future__ import annotations

import torch
from torch import Tensor

from . import launch


def run(
    delta: Tensor, channel: Tensor, x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, *, eps: float, training: bool,
    y: Tensor | None, pool: int, gap: Tensor | None,
) -> Tensor:  # fmt: skip
    delta, channel = delta.contiguous(), channel.contiguous()
    mean, var, gamma = mean.contiguous(), var.contiguous(), gamma.contiguous()
    perturbations, samples, height, width = delta.shape
    out = torch.empty(perturbations, samples, height // pool, width // pool, dtype=torch.float32, device="cpu")
    none = (0, 0, 0, 0)
    launch(
        __name__, delta, channel, x, mean, var, gamma, y, gap, out, eps, *delta.shape, *x.stride(),
        *(y.stride() if y is not None else none), *(gap.stride() if gap is not None else none), pool, training,
    )  # fmt: skip
    return out
