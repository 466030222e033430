from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Gauss-Legendre nodes and weights on [0, 1]; with six points the integral of the slope over 1/8 has a relative error
# below 1e-13.
_HALF = (
    (0.033765242898424, 0.085662246189585),
    (0.169395306766868, 0.180380786524069),
    (0.380690406958402, 0.233956967286346),
)
_NODES = (*_HALF, *((1 - node, weight) for node, weight in _HALF))


def _slope(x: Tensor, approximate: str) -> Tensor:
    if approximate == "none":
        return torch.special.ndtr(x) + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    root = math.sqrt(8 / math.pi)
    s = torch.sigmoid(root * (x + 0.044715 * x.pow(3)))
    return s + x * s * (1 - s) * root * (1 + 3 * 0.044715 * x.square())


def run(delta: Tensor, z: Tensor, *, approximate: str, out_dtype: torch.dtype) -> Tensor:
    d, base = delta.double(), z.double()
    near = d.clamp(-0.125, 0.125)
    mean_slope = sum(weight * _slope(base + node * near, approximate) for node, weight in _NODES)
    direct = F.gelu(base + d, approximate=approximate) - F.gelu(base, approximate=approximate)
    return torch.where(d.abs() > 0.125, direct, near * mean_slope).to(out_dtype).contiguous()
