from __future__ import annotations

import torch
from torch import Tensor


def run(
    delta: Tensor, zc: Tensor, var: Tensor, gamma: Tensor | None, *, eps: float, centre: bool, out_dtype: torch.dtype
) -> Tensor:
    d, z = delta.double(), zc.double()
    if centre:
        d = d - d.mean(2, keepdim=True)
        d = d - d.mean(2, keepdim=True)  # removes the rounding error of the first mean
    dvar = (d * (2 * z + d)).mean(2, keepdim=True)
    s = (var + eps).sqrt()[:, None]
    t = ((z + d).square().mean(2, keepdim=True) + eps).sqrt()
    out = d / t - z * (dvar / (s * t * (s + t)))
    if gamma is not None:
        out = out * gamma.double()
    return out.to(out_dtype).contiguous()
