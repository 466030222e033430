from __future__ import annotations

import torch
from torch import Tensor

from . import is_half, kernel_dtype, launch

Size = tuple[int, int]


def run(
    delta: Tensor, channel: Tensor, weight: Tensor, zc: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, *,
    stride: Size, padding: Size, dilation: Size, eps: float, training: bool, relu: bool, pool: int, mean: bool,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    perturbations, samples, height, width = delta.shape
    outs, rows, columns = zc.shape[1:]
    delta, channel, weight = delta.contiguous(), channel.contiguous(), weight.contiguous()
    zc = zc.transpose(0, 1).contiguous()  # no copy if already laid out so
    var, gamma, beta = var.contiguous(), gamma.contiguous(), beta.contiguous()
    size = () if mean else (rows // pool, columns // pool)
    out = torch.empty(perturbations, samples, *size, outs, dtype=kernel_dtype(out_dtype), device="cpu")
    launch(
        __name__, delta, channel, weight, zc, var, gamma, beta, out, eps, perturbations, samples,
        height, width, rows, columns, *weight.shape[1::-1], *weight.shape[2:], *stride, *padding, *dilation, pool,
        training, relu, mean, is_half(out),
    )  # fmt: skip
    return out.to(out_dtype).movedim(-1, 2)
