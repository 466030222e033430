from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def run(
    delta: Tensor, channel: Tensor, x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, *, eps: float, training: bool,
    y: Tensor | None, pool: int, gap: Tensor | None,
) -> Tensor:  # fmt: skip
    def at_channel(values: Tensor) -> Tensor:  # [C] -> [P, 1, 1, 1]
        return values[channel][:, None, None, None]

    def moment(values: Tensor) -> Tensor:
        return values.mean((1, 2, 3), keepdim=True)

    d = delta.double()
    before = at_channel(var) + eps
    s = before.sqrt()
    if training:
        z = x.transpose(0, 1)[channel].double() - at_channel(mean)
        d = d - moment(d)
        dvar = moment(d * (2 * z + d))
        after = before + dvar
        after = torch.where(after < before / 16, moment((z + d).square()) + eps, after)
        t = after.sqrt()
        out = at_channel(gamma) * (d / t - z * (dvar / (s * t * (s + t))))
    else:
        out = at_channel(gamma) / s * d
    if y is not None:
        base = y.transpose(0, 1)[channel].double()
        out = torch.where(base > 0, torch.maximum(out, -base), torch.clamp_min(base + out, 0))
    if gap is not None:
        out = F.max_pool2d(gap.transpose(0, 1)[channel].double() + out, pool)
    return out.to(delta.dtype).contiguous()
