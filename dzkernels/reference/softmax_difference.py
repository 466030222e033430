from __future__ import annotations

import torch
from torch import Tensor


def softmax_difference(delta: Tensor, p: Tensor, *, log: bool) -> Tensor:
    probs, impossible = p.double(), p == 0
    d = delta.double()
    counted = d.masked_fill(impossible, 0.0)
    moved = (probs * torch.expm1(counted.clamp_max(700.0))).sum(2, keepdim=True)
    far = torch.logsumexp(probs.log() + counted, 2, keepdim=True)
    near = (counted.amax(2, keepdim=True) <= 700.0) & (moved > -0.5)
    m = torch.where(near, torch.log1p(moved.clamp_min(-0.5)), far)
    out = d - m if log else (probs * torch.expm1(counted - m)).masked_fill(impossible, 0.0)
    return out.to(delta.dtype).contiguous()
