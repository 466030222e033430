from __future__ import annotations

import torch
from torch import Tensor

from . import launch

Size = tuple[int, int]


def run(
    x: Tensor, coord: Tensor, step: Tensor, zc: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, *, kernel: Size,
    stride: Size, padding: Size, dilation: Size, groups: int, eps: float, training: bool, relu: bool, pool: int,
) -> Tensor:  # fmt: skip
    samples, outs, rows, columns = zc.shape
    x, zc = x.transpose(0, 1).contiguous(), zc.transpose(0, 1).contiguous()  # no copy if already laid out so
    coord, step = coord.contiguous(), step.contiguous()
    var, gamma, beta = var.contiguous(), gamma.contiguous(), beta.contiguous()
    out = torch.empty(coord.shape[0], samples, rows // pool, columns // pool, dtype=torch.float32, device="cpu")
    launch(
        __name__, x, coord, step, zc, var, gamma, beta, out, eps, coord.shape[0], samples, *x.shape[2:],
        rows, columns, *stride, *padding, *dilation, x.shape[0] // groups, outs // groups, pool, training, relu,
    )  # fmt: skip
    return out
