from __future__ import annotations

import torch
from torch import Tensor


def run(delta: Tensor, p: Tensor, *, log: bool) -> Tensor:
    probs, impossible = p.double(), p == 0
    d = delta.double()
    counted = d.masked_fill(impossible, 0.0)
    moved = (probs * torch.expm1(counted.clamp_max(700.0))).sum(2, keepdim=True)
    near = (counted.amax(2, keepdim=True) <= 700.0) & (moved > -0.5)
    # m = top + rest, kept apart: top may be so large that rest would drown.
    top = torch.where(near, 0.0, d.masked_fill(impossible, -torch.inf).amax(2, keepdim=True))
    total = (probs * torch.exp((counted - top).masked_fill(impossible, 0.0).clamp_max(700.0))).sum(2, keepdim=True)
    rest = torch.where(near, torch.log1p(moved.clamp_min(-0.5)), (total / probs.sum(1)[:, None]).log())
    moved_by = d - top - rest
    out = moved_by if log else (probs * torch.expm1(moved_by)).masked_fill(impossible, 0.0)
    return out.to(delta.dtype).contiguous()
