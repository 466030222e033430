"""Moments that a convolution leaves to the norm after it: the base input of that norm, and what bounds them."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers import UNIT, normal


def centred(*shape: int) -> Tensor:
    """Base input [N, O, Ho, Wo] of a norm minus its mean, in channels-last memory."""
    values = normal(*shape, seed=9).double()
    return (values - values.mean((0, 2, 3), keepdim=True)).float().contiguous(memory_format=torch.channels_last)


def moments_by_rerun(out: Tensor, zc: Tensor) -> tuple[Tensor, Tensor]:
    """[P, 2, O] by taking both variances in float64, and how far sums of 256 float32 terms may be from it."""
    d, z = out.double(), zc.double()
    mean, dims = d.mean((1, 3, 4)), (1, 3, 4)
    moved = z + d
    spreads = [v - v.mean(axes, keepdim=True) for v, axes in ((moved, dims), (z, (0, 2, 3)))]
    change = spreads[0].square().mean(dims) - spreads[1].square().mean((0, 2, 3))
    spread = (d - mean[:, None, :, None, None]).abs()
    unit, terms = UNIT[torch.float32], 256 + 8  # and the roundings of e, of the products and of what is kept of a sum
    about = spread + spread.amax(dims, keepdim=True) + terms * unit * d.abs().amax(dims, keepdim=True)
    bound = torch.stack([about.mean(dims), (2 * z.abs() * about + about.square()).mean(dims)], 1)
    rerun = UNIT[torch.float64] * 64 * (moved.square().mean(dims) + z.square().mean((0, 2, 3)))
    return torch.stack([mean, change], 1), terms * unit * bound + rerun.unsqueeze(1)
