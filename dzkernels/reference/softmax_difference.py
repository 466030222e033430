from __future__ import annotations

import torch
from torch import Tensor


def run(delta: Tensor, p: Tensor, *, log: bool) -> Tensor:
    probs, impossible = p.double(), p == 0
    d = delta.double()
    masked = d.masked_fill(impossible, 0.0)
    sum_expm1 = (probs * torch.expm1(masked.clamp_max(700.0))).sum(2, keepdim=True)
    near = (masked.amax(2, keepdim=True) <= 700.0) & (sum_expm1 > -0.5)
    # m = top + rest, not added: rest would be lost beside a large top
    top = torch.where(near, 0.0, d.masked_fill(impossible, -torch.inf).amax(2, keepdim=True))
    total = (probs * torch.exp((masked - top).masked_fill(impossible, 0.0).clamp_max(700.0))).sum(2, keepdim=True)
    rest = torch.where(near, torch.log1p(sum_expm1.clamp_min(-0.5)), (total / probs.sum(1)[:, None]).log())
    d_minus_m = d - top - rest
    out = d_minus_m if log else (probs * torch.expm1(d_minus_m)).masked_fill(impossible, 0.0)
    return out.to(delta.dtype).contiguous()
