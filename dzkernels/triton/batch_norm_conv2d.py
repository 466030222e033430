from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._check import output_size
from ._config import Config, launch
from .dense_batch_norm import change_at, channels_last, coefficients_of, kind_of_residual

Size = tuple[int, int]


@triton.jit
def _kernel(
    delta, zc, coefficients, residual, residual_channel, y, weight, out, P, R, C, filters, Q, H, W, Ho, Wo, blocks,
    KW: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRAINING: tl.constexpr, RESIDUAL: tl.constexpr,
    RELU: tl.constexpr, UPCAST: tl.constexpr, PIXELS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """A matrix product per tap and block of input channels; the norm is applied to what was loaded."""
    # perturbations next to each other: they share zc, y and the weight, which stay in L2
    p, q = (tl.program_id(0) % P).to(tl.int64), tl.program_id(0) // P * PIXELS + tl.arange(0, PIXELS)
    o = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    n, top, left = (q // (Ho * Wo)).to(tl.int64), q // Wo % Ho * STRIDE_H - PAD_H, q % Wo * STRIDE_W - PAD_W
    total = tl.zeros((PIXELS, OUTS), dtype=tl.float32)
    for k in range(0, TAPS * blocks):
        tap = k // blocks
        c = k % blocks * INS + tl.arange(0, INS)
        row, column = top + tap // KW * DIL_H, left + tap % KW * DIL_W
        known = (q < Q) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        a = change_at(
            delta, zc, coefficients, residual, residual_channel, y, p, (n * H + row) * W + column, c, known, R, C,
            TRAINING, RESIDUAL, RELU,
        )  # fmt: skip
        a = tl.where(known[:, None] & (c < C)[None, :], a, 0.0).to(weight.dtype.element_ty)
        b = tl.load(
            weight + (tap * C + c)[:, None] * filters + o[None, :],
            mask=(c < C)[:, None] & (o < filters)[None, :],
            other=0.0,
        )
        if UPCAST:  # Triton's interpreter takes bfloat16 operands for integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="tf32x3")
    tl.store(out + (p * Q + q)[:, None] * filters + o[None, :], total, mask=(q < Q)[:, None] & (o < filters)[None, :])


def batch_norm_conv2d(
    delta: Tensor, zc: Tensor, var: Tensor, gamma: Tensor, weight: Tensor, *, eps: float, training: bool,
    residual: Tensor | None, residual_channel: Tensor | None, y: Tensor | None, stride: Size, padding: Size,
    dilation: Size,
) -> Tensor:  # fmt: skip
    perturbations, samples, channels, height, width = delta.shape
    outs, _, kernel_h, kernel_w = weight.shape
    rows, columns = output_size("batch_norm_conv2d", height, width, (kernel_h, kernel_w), stride, padding, dilation)
    out = torch.empty(perturbations, samples, rows, columns, outs, dtype=weight.dtype, device=delta.device)
    if out.numel() > 0:
        delta, zc, y = channels_last(delta), channels_last(zc), channels_last(y) if y is not None else None
        kind, residual, residual_channel = kind_of_residual(residual, residual_channel)
        coefficients = coefficients_of(delta, zc, var.contiguous(), gamma.contiguous(), eps, training)
        turned = weight.permute(2, 3, 1, 0).contiguous()  # [kh, kw, C, O]
        pixels, results = samples * height * width, samples * rows * columns

        def run(config: Config) -> None:
            grid = (perturbations * triton.cdiv(results, config["PIXELS"]), triton.cdiv(outs, across))
            _kernel[grid](
                delta, zc, coefficients, residual, residual_channel, y, turned, out, perturbations, pixels, channels,
                outs, results, height, width, rows, columns, triton.cdiv(channels, ins), kernel_w,
                kernel_h * kernel_w, *stride, *padding, *dilation, TRAINING=training, RESIDUAL=kind, RELU=y is not None,
                UPCAST=os.environ.get("TRITON_INTERPRET") == "1", OUTS=across, INS=ins, **config,
            )  # fmt: skip

        # tl.dot takes at least 16 x 16 x 16. INS is not tuned: the order of the sum over inputs depends on it.
        # Channels that no wide load can read take more registers.
        ins = 32 if channels % 16 == 0 and channels > 16 else 16
        across = min(64, max(16, triton.next_power_of_2(outs)))
        configs = [
            {"PIXELS": down, "num_warps": warps, "num_stages": stages}
            for down, warps, stages in ((128, 8, 2), (64, 4, 2), (64, 4, 3), (256, 8, 2))
        ]
        sizes = (perturbations, *delta.shape[1:], outs, kernel_h, kernel_w, *stride, kind, delta.dtype, weight.dtype)
        launch("batch_norm_conv2d", sizes, configs, run)
    return out.permute(0, 1, 4, 2, 3)
