from __future__ import annotations

import torch
from torch import Tensor


def channel_batch_norm(
    delta: Tensor, channel: Tensor, x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, *, eps: float, y: Tensor | None
) -> Tensor:
    def at_channel(values: Tensor) -> Tensor:  # [C] -> [P, 1, 1, 1]
        return values[channel][:, None, None, None]

    def moment(values: Tensor) -> Tensor:
        return values.mean((1, 2, 3), keepdim=True)

    z = x.transpose(0, 1)[channel].double() - at_channel(mean)
    d = delta.double() - moment(delta.double())
    before = at_channel(var) + eps
    dvar = moment(d * (2 * z + d))
    after = before + dvar
    after = torch.where(after < before / 16, moment((z + d).square()) + eps, after)
    s, t = before.sqrt(), after.sqrt()
    dy = at_channel(gamma) * (d / t - z * (dvar / (s * t * (s + t))))
    if y is not None:
        base = y.transpose(0, 1)[channel].double()
        dy = torch.where(base > 0, torch.maximum(dy, -base), torch.clamp_min(base + dy, 0))
    return dy.to(delta.dtype).contiguous()
