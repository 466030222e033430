from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def run(
    delta: Tensor, channel: Tensor, weight: Tensor, *, stride: Size, padding: Size, dilation: Size, groups: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    perturbations, samples = delta.shape[:2]
    rows, width = weight.shape[0], weight.shape[1]
    group = channel // width
    # One group of a grouped convolution per perturbation: its channel, with the filters of that channel's group.
    own = weight.reshape(groups, rows // groups, *weight.shape[1:])[
        group, :, channel % width
    ]  # [P, O / groups, kh, kw]
    if perturbations * samples == 0:
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(delta.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        ]
        return delta.new_empty(perturbations, samples, *size, rows, dtype=out_dtype).permute(0, 1, 4, 2, 3)
    out = F.conv2d(
        delta.transpose(0, 1), own.flatten(0, 1).unsqueeze(1), None, stride, padding, dilation, perturbations
    )
    out = out.reshape(samples, perturbations, rows // groups, *out.shape[2:]).permute(
        1, 0, 3, 4, 2
    )  # [P, N, Ho, Wo, O / groups]
    if groups > 1:
        dense = out.new_zeros(*out.shape[:-1], groups, rows // groups)
        dense[torch.arange(perturbations), :, :, :, group] = out
        out = dense.flatten(-2)
    return out.to(out_dtype).contiguous().permute(0, 1, 4, 2, 3)
