from __future__ import annotations

import torch
from torch import Tensor

from .._load import native


def channel_batch_norm(
    delta: Tensor, channel: Tensor, x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, *, eps: float, y: Tensor | None
) -> Tensor:
    delta, channel = delta.contiguous(), channel.contiguous()
    mean, var, gamma = mean.contiguous(), var.contiguous(), gamma.contiguous()
    out = torch.empty(delta.shape, dtype=torch.float32, device="cpu")
    native().channel_batch_norm(
        delta.data_ptr(), channel.data_ptr(), x.data_ptr(), mean.data_ptr(), var.data_ptr(), gamma.data_ptr(),
        y.data_ptr() if y is not None else 0, out.data_ptr(), eps,
        *delta.shape, *x.stride(), *(y.stride() if y is not None else (0, 0, 0, 0)),
    )  # fmt: skip
    return out
