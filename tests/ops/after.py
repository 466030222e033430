"""What the tests of convolutions with the norm after them share: a norm, and the change of its output in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dzkernels._norm import before_relu, window_gap
from helpers import UNIT, normal
from ops.cases import dense_batch_norm

U = UNIT[torch.float32]


def planes(values: Tensor) -> Tensor:
    """The same values, channel by channel in memory."""
    return values.transpose(0, 1).contiguous().transpose(0, 1)


def norm_of(samples: int, channels: int, height: int, width: int) -> dict[str, Any]:
    z = normal(samples, channels, height, width, seed=11)
    zc = planes((z - z.double().mean((0, 2, 3), keepdim=True)).float())
    return {
        "zc": zc,
        "var": zc.double().var((0, 2, 3), correction=0),
        "gamma": normal(channels, seed=12),
        "beta": normal(channels, seed=13),
        "eps": dense_batch_norm.EPS,
    }


def changed(
    delta: Tensor, error: Tensor, norm: dict[str, Any], *, training: bool, relu: bool, pool: int
) -> tuple[Tensor, Tensor]:
    """The change for a float64 difference [P, N, C, H, W] that the kernel has up to ``error``, and its bound."""
    zc, var, gamma, beta = (norm[name].double() for name in ("zc", "var", "gamma", "beta"))
    y = before_relu(zc, var, gamma, beta, norm["eps"])
    gap = window_gap(y, F.max_pool2d(y.clamp(min=0), pool), pool)
    args = norm | {"delta": delta, "y": y, "gap": gap, "pool": 1}
    change, bound = dense_batch_norm.by_rerun(args, False, training)
    # The norm of a difference that is off: directly, in its mean, and in its variance (as the moments of by_rerun).
    dims, z = (1, 3, 4), zc.abs()
    s = (var + norm["eps"]).sqrt()[:, None, None]
    size = gamma.abs()[:, None, None]
    if training:
        new = ((zc + delta).var(dims, correction=0, keepdim=True) + norm["eps"]).sqrt()
        off = (2 * (z + (delta - delta.mean(dims, keepdim=True)).abs()) * error).mean(dims, keepdim=True)
        spread = (delta - delta.mean(dims, keepdim=True)).abs()
        bound = bound + size * (error + error.mean(dims, keepdim=True)) / new
        bound = bound + 2 * size * off * (z / (s * new * (s + new)) + spread / (2 * new.pow(3)))
    else:
        bound = bound + size * error / s
    if not relu:
        return change, bound
    # y is off by three roundings of its two terms, which shows where a unit or a window changes sides
    terms = 4 * U * (size / s * z + beta.abs()[:, None, None])
    moved = (y + change).clamp_min(0) - y.clamp_min(0)
    bound = bound + terms + U * (y.abs() + change.abs())
    if pool == 1:
        return moved, bound
    bound = bound + U * (gap.abs() + moved.abs()) + F.pad(_largest(terms, pool), _missing(terms, pool))
    moved, bound = (F.max_pool2d(v.flatten(0, 1), pool).unflatten(0, v.shape[:2]) for v in (gap + moved, bound))
    return moved, bound


def _largest(values: Tensor, pool: int) -> Tensor:
    return F.max_pool2d(values, pool).repeat_interleave(pool, 2).repeat_interleave(pool, 3)


def _missing(values: Tensor, pool: int) -> list[int]:
    """How far windows do not reach, as F.pad takes it."""
    return [0, values.shape[3] % pool, 0, values.shape[2] % pool]
