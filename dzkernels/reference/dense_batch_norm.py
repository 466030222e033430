from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._norm import moments as moments_of


def run(
    delta: Tensor, zc: Tensor, var: Tensor, gamma: Tensor, *, eps: float, training: bool, residual: Tensor | None,
    residual_channel: Tensor | None, y: Tensor | None, pool: int, gap: Tensor | None, out_dtype: torch.dtype,
    moments: Tensor | None,
) -> Tensor:  # fmt: skip
    def at_channel(values: Tensor) -> Tensor:  # [C] -> [C, 1, 1]
        return values[:, None, None]

    def moment(values: Tensor) -> Tensor:
        return values.mean((1, 3, 4), keepdim=True)

    d = delta.double()
    before = at_channel(var) + eps
    s = before.sqrt()
    if training:
        z = zc.double()
        mean, dvar = (moments_of(d, z) if moments is None else moments)[:, :, None, :, None, None].unbind(1)
        d = d - mean
        after = before + dvar
        after = torch.where(after < before / 16, moment((z + d).square()) + eps, after)
        t = after.sqrt()
        out = at_channel(gamma) * (d / t - z * (dvar / (s * t * (s + t))))
    else:
        out = at_channel(gamma) / s * d
    if residual_channel is not None and residual is not None:
        out[torch.arange(len(out)), :, residual_channel] += residual.double()
    elif residual is not None:
        out = out + residual.double()
    if y is not None:
        base = y.double()
        out = torch.where(base > 0, torch.maximum(out, -base), torch.clamp_min(base + out, 0))
    if gap is not None and out.shape[0] > 0:
        out = F.max_pool2d((gap.double() + out).flatten(0, 1), pool).unflatten(0, out.shape[:2])
    elif gap is not None:
        out = out[..., ::pool, ::pool][..., : out.shape[3] // pool, : out.shape[4] // pool]
    return out.to(out_dtype).movedim(2, -1).contiguous().movedim(-1, 2)
