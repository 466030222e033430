from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._norm import moments

Size = tuple[int, int]


def run(
    delta: Tensor, weight: Tensor, *, stride: Size, padding: Size, dilation: Size, groups: int,
    next_zc: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    # torch's convolutions are fastest in channels-last layout, which is also the layout of the result
    images = delta.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(images, weight, None, stride, padding, dilation, groups)
    out = out.contiguous(memory_format=torch.channels_last).unflatten(0, delta.shape[:2])
    return out if next_zc is None else (out, moments(out, next_zc))
