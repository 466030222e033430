from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .. import backends
from .._op import BASE, BFLOAT16, Arg, Kernel, Op
from ._batch_norm import DENSE, base_dtype, dense_options, dense_tensors

OP = Op(
    __name__,
    *DENSE,
    Arg("gap", "N, C, H, W", BASE, optional=True),
    cpu=Kernel(BFLOAT16),
    triton=Kernel(BFLOAT16),
)


def dense_batch_norm(
    delta: Tensor,
    zc: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    *,
    eps: float = 1e-5,
    training: bool = True,
    residual: Tensor | None = None,
    residual_channel: Tensor | None = None,
    y: Tensor | None = None,
    relu: bool = False,
    pool: int = 1,
    gap: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    """A dense difference through batch norm, plus a residual difference, then ReLU and max pooling.

    training: d = delta[p] - mean(delta[p]), dvar = mean(2 zc d + d^2), s = sqrt(var + eps), s' = sqrt(var + dvar + eps)
              a = gamma * (d / s' - zc * dvar / (s * s' * (s + s'))), means over N, H, W of each channel
    else:     a = gamma / s * delta[p]
    a = a + residual[p], if given
    relu:     a = max(y + a, 0) - max(y, 0)
    pool > 1: out = max of gap + a over windows of pool x pool, without padding; trailing rows and columns are dropped

    delta             [P, N, C, H, W]
    zc                [N, C, H, W]     base input of the norm minus its mean, rounded once; base dtype
    var               [C] float64      biased variance of the base input (training), or the running variance
    gamma             [C]              weight of the norm, float32 or float64; None means 1
    residual          [P, N, C, H, W]  any floating-point dtype; or, with residual_channel [P] int64,
                      [P, N, H, W]     the difference of that one channel, base dtype
    y                 [N, C, H, W]     base value before the ReLU, residual included, base dtype; needed with relu only
    gap               [N, C, H, W]     base activation minus the maximum of its window (<= 0), base dtype; with pool > 1
    moments           [P, 2, C] float64  mean(delta[p]) and dvar, if the convolution before returned them
                                       (dense_conv2d). With training only; a backend may recompute them
    result            [P, N, C, H // pool, W // pool]  a view of contiguous [P, N, H, W, C] memory, dtype out_dtype

    The base dtype is float64 for a float64 delta, else float32; the result has it unless out_dtype is given.

    Exactness: float32 arithmetic. Moments are float64 sums of float32 sums of at most 64 terms, about a value near the
    mean; the new variance is recomputed where it would cancel. The error of an output is at most the sum of

        a few u    |gamma| (|d| / s' + |zc dvar| / (s s' (s + s'))) + |residual|    arithmetic of the element
        70 u       |gamma| (mean|d| / s' + |zc| m / (s s' (s + s')))                moments; m = mean(2 |zc d| + d^2)

    Cost: reads delta twice (once if given moments) and residual once, writes the result; zc, y and gap stay in cache.
    """
    options = dense_options(
        OP.name, eps=eps, training=training, residual=residual, residual_channel=residual_channel, y=y, relu=relu,
        moments=moments,
    )  # fmt: skip
    gap = None if pool == 1 else gap
    sizes = OP(delta, zc, var, gamma, *dense_tensors(**options), gap)
    if check.pool(OP.name, pool, sizes["H"], sizes["W"]) > 1:
        check.given(OP.name, "gap", gap, f"pool={pool}")
    scale = torch.ones_like(var) if gamma is None else gamma.to(torch.float64)
    return backends.run(
        OP.name, delta, delta, zc, var, scale, **options, pool=pool, gap=gap,
        out_dtype=check.float_dtype(OP.name, "out_dtype", out_dtype, base_dtype(delta)),
    )  # fmt: skip
