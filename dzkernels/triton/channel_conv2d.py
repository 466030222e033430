from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._check import output_size
from ._config import Config, launch

Size = tuple[int, int]


@triton.jit
def _kernel(
    delta, channel, weight, out, N, H, W, Ho, Wo, channels, wo, wc, wh, ww, in_per_group, out_per_group,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)  # p * N + n
    c = tl.load(channel + plane // N)
    first = c // in_per_group * out_per_group  # first output channel of the group
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    own = (o >= first) & (o < first + out_per_group)
    total = tl.zeros((BLOCK, BLOCK_O), dtype=tl.float32)
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            row = pixel // Wo * STRIDE_H + i * DIL_H - PAD_H
            column = pixel % Wo * STRIDE_W + j * DIL_W - PAD_W
            inside = (pixel < Ho * Wo) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            d = tl.load(delta + plane * H * W + row * W + column, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weight + o * wo + c % in_per_group * wc + i * wh + j * ww, mask=own, other=0.0)
            w = w.to(tl.float32)
            # Outside the group the result is 0 even where delta is NaN, so masking the weight is not enough.
            total += tl.where(own[None, :], d[:, None] * w[None, :], 0.0)
    where = (plane * Ho * Wo + pixel[:, None]) * channels + o[None, :]
    tl.store(out + where, total, mask=(pixel < Ho * Wo)[:, None] & (o < channels)[None, :])


def run(
    delta: Tensor, channel: Tensor, weight: Tensor, *, stride: Size, padding: Size, dilation: Size, groups: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    perturbations, samples, height, width = delta.shape
    channels, per_group, kernel_h, kernel_w = weight.shape
    rows, columns = output_size(height, width, (kernel_h, kernel_w), stride, padding, dilation)
    delta, channel = delta.contiguous(), channel.contiguous()
    inner = out_dtype if out_dtype in (torch.float32, torch.bfloat16) else torch.float32
    out = torch.empty(perturbations, samples, rows, columns, channels, dtype=inner, device=delta.device)
    if out.numel() > 0:

        def start(config: Config) -> None:
            planes, pixels = perturbations * samples, triton.cdiv(rows * columns, config["BLOCK"])
            _kernel[(planes, pixels, triton.cdiv(channels, config["BLOCK_O"]))](
                delta, channel, weight, out, samples, height, width, rows, columns, channels, *weight.stride(),
                per_group, channels // groups, kernel_h, kernel_w, *stride, *padding, *dilation, **config,
            )  # fmt: skip

        whole, across = triton.next_power_of_2(rows * columns), triton.next_power_of_2(channels)
        configs = [
            {"BLOCK": min(block, whole), "BLOCK_O": min(block_o, across), "num_warps": warps}
            for block, block_o, warps in ((64, 64, 4), (128, 32, 4), (128, 64, 8), (256, 16, 4))
        ]
        sizes = (perturbations, samples, rows, columns, channels, kernel_h, kernel_w, delta.dtype, inner)
        launch(__name__, sizes, configs, start)
    return out.to(out_dtype).permute(0, 1, 4, 2, 3)
