from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .. import backends
from .._op import FLOAT64, INT64, LEAD, LIKE, WIDE, Arg, Kernel, Op

OP = Op(
    __name__,
    Arg("delta", "P, N, H, W", LEAD, filled="N, H and W"),
    Arg("channel", "P", INT64, below="C", what="channels of x"),
    Arg("x", "N, C, H, W", LIKE),
    Arg("mean", "C", FLOAT64),
    Arg("var", "C", FLOAT64),
    Arg("gamma", "C", WIDE, optional=True),
    Arg("y", "N, C, H, W", LIKE, optional=True),
    Arg("gap", "N, C, H, W", LIKE, optional=True),
    cpu=Kernel(),
    triton=Kernel(),
    cuda=Kernel(),
)


def channel_batch_norm(
    delta: Tensor,
    channel: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    *,
    eps: float = 1e-5,
    training: bool = True,
    y: Tensor | None = None,
    relu: bool = False,
    pool: int = 1,
    gap: Tensor | None = None,
) -> Tensor:
    """A single-channel difference through batch norm, ReLU and max pooling.

    With z = x[:, c] - mean[c], c = channel[p], d = delta[p] - mean(delta[p]), s = sqrt(var[c] + eps):
    training: dvar = mean(2 z d + d^2), s' = sqrt(var[c] + dvar + eps)
              a = gamma[c] * (d / s' - z * dvar / (s * s' * (s + s')))
    else:     a = gamma[c] / s * delta[p]
    relu:     a = max(y + a, 0) - max(y, 0)
    pool > 1: out = max of gap + a over windows of pool x pool, without padding; trailing rows and columns are dropped

    delta    [P, N, H, W]     difference of channel channel[p] of x
    channel  [P] int64        the perturbed channel, 0 .. C - 1
    x        [N, C, H, W]     base input of the norm, dtype of delta
    mean     [C] float64      of x over N, H, W; x and mean are read only with training
    var      [C] float64      biased variance of x over N, H, W (training), or the running variance
    gamma    [C]              weight of the norm, float32 or float64; None means 1
    y        [N, C, H, W]     base output of the norm before the ReLU, dtype of delta; needed with relu only
    gap      [N, C, H, W]     base activation minus the maximum of its window (<= 0), dtype of delta; with pool > 1
    result   [P, N, H // pool, W // pool]  contiguous, dtype of delta

    Exactness: as in dense_batch_norm.
    Cost: reads delta twice, writes the result. Consecutive perturbations of one channel share its planes of x, y and
    gap, which are read fastest from contiguous [C, N, H, W] memory.
    """
    y = check.given(OP.name, "y", y, "relu=True") if relu else None
    gap = None if pool == 1 else gap
    sizes = OP(delta, channel, x, mean, var, gamma, y, gap)
    if check.pool(OP.name, pool, sizes["H"], sizes["W"]) > 1:
        check.given(OP.name, "gap", gap, f"pool={pool}")
    scale = torch.ones_like(mean) if gamma is None else gamma.to(torch.float64)
    return backends.run(
        OP.name, delta, delta, channel, x, mean, var, scale, eps=check.eps(OP.name, eps), training=bool(training),
        y=y, pool=pool, gap=gap,
    )  # fmt: skip
