"""Convolutions of differences as matrix products, with a batch norm before them or none."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._check import output_size
from ._config import Config, launch
from .dense_batch_norm import PARTS, change_at, channels_last, empty_parts, merged

Size = tuple[int, int]
STRIP = 64  # maximum output channels of a program; the input is read once for each strip of output channels


@triton.jit
def _kernel(
    delta, zc, coefficients, residual, residual_channel, y, weight, next_zc, out, parts, P, R, C, filters, ins_of_group,
    outs_of_group, strips, Q, H, W, Ho, Wo, tiles, blocks,
    KW: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, NORM: tl.constexpr, TRAINING: tl.constexpr,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, MOMENTS: tl.constexpr, UPCAST: tl.constexpr, PIXELS: tl.constexpr,
    OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """One matrix product per tap and block of input channels.

    NORM     the input is the change after a batch norm, computed by change_at from delta and zc .. y
    MOMENTS  also writes parts[p, tile], as _moments in dense_batch_norm.py, of the rounded result
    """
    # perturbations vary fastest: they share zc, y, next_zc and the weight, which stay in L2
    p, tile = (tl.program_id(0) % P).to(tl.int64), tl.program_id(0) // P
    q = tile * PIXELS + tl.arange(0, PIXELS)
    group, within = tl.program_id(1) // strips, tl.program_id(1) % strips * OUTS + tl.arange(0, OUTS)
    o, wanted = group * outs_of_group + within, (q < Q)[:, None] & (within < outs_of_group)[None, :]
    n, top, left = (q // (Ho * Wo)).to(tl.int64), q // Wo % Ho * STRIDE_H - PAD_H, q % Wo * STRIDE_W - PAD_W
    total = tl.zeros((PIXELS, OUTS), dtype=tl.float32)
    for k in range(0, TAPS * blocks):
        tap = k // blocks
        i = k % blocks * INS + tl.arange(0, INS)
        c = group * ins_of_group + i
        row, column = top + tap // KW * DIL_H, left + tap % KW * DIL_W
        known = (q < Q) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        r, inside = (n * H + row) * W + column, known[:, None] & (i < ins_of_group)[None, :]
        if NORM:
            a = change_at(
                delta, zc, coefficients, residual, residual_channel, y, p, r, c, known, R, C, TRAINING, RESIDUAL, RELU
            )
            a = tl.where(inside, a, 0.0).to(weight.dtype.element_ty)
        else:
            a = tl.load(delta + (p * R + r)[:, None] * C + c[None, :], mask=inside, other=0.0)
        b = tl.load(
            weight + (tap * ins_of_group + i).to(tl.int64)[:, None] * filters + o[None, :],
            mask=(i < ins_of_group)[:, None] & (within < outs_of_group)[None, :],
            other=0.0,
        )
        if UPCAST:  # Triton's interpreter treats bfloat16 operands as integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="tf32x3")
    result = total.to(out.dtype.element_ty)
    tl.store(out + (p * Q + q)[:, None] * filters + o[None, :], result, mask=wanted)
    if MOMENTS:
        d = tl.where(wanted, result.to(tl.float32), 0.0)
        shift = tl.sum(d, 0) / tl.minimum(PIXELS, Q - tile * PIXELS)  # sums about it do not cancel
        e = tl.where(wanted, d - shift[None, :], 0.0)
        z = tl.load(next_zc + q.to(tl.int64)[:, None] * filters + o[None, :], mask=wanted, other=0.0)
        to, in_group = parts + (p * tiles + tile) * PARTS * filters + o, within < outs_of_group
        tl.store(to, shift, mask=in_group)
        tl.store(to + filters, tl.sum(e, 0), mask=in_group)
        tl.store(to + 2 * filters, tl.sum(e * e, 0), mask=in_group)
        tl.store(to + 3 * filters, tl.sum(z * e, 0), mask=in_group)
        tl.store(to + 4 * filters, tl.sum(z, 0), mask=in_group)


def convolve(
    module: str, delta: Tensor, weight: Tensor, next_zc: Tensor | None, *, stride: Size, padding: Size, dilation: Size,
    groups: int = 1, norm: dict[str, Any] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The convolution of the op of `module`, a __name__; delta [P, N, H, W, C] contiguous, P and N at least 1.

    norm  the arguments of change_at besides delta, and its constants
    """
    perturbations, samples, height, width, channels = delta.shape
    outs, ins_of_group, kernel_h, kernel_w = weight.shape
    rows, columns = output_size(height, width, (kernel_h, kernel_w), stride, padding, dilation)
    out = torch.empty(perturbations, samples, rows, columns, outs, dtype=weight.dtype, device=delta.device)
    by_tap = weight.permute(2, 3, 1, 0).contiguous()  # [kh, kw, C, O]
    pixels, results, outs_of_group = samples * height * width, samples * rows * columns, outs // groups
    # tl.dot needs at least 16 x 16 x 16. INS is not tuned: the order of the sum over input channels depends on it.
    # Input channels that cannot be read by wide loads take more registers, hence the smaller block.
    ins = 32 if ins_of_group % 16 == 0 and ins_of_group > 16 else 16
    across = min(STRIP, max(16, triton.next_power_of_2(outs_of_group)))
    strips = triton.cdiv(outs_of_group, across)
    configs = [
        {"PIXELS": down, "num_warps": warps, "num_stages": stages}
        for down, warps, stages in ((128, 8, 2), (128, 8, 3), (64, 4, 2), (64, 4, 3), (256, 8, 2))
    ]
    parts = None
    if next_zc is not None:
        next_zc = channels_last(next_zc)
        configs = configs[:2]  # with the others the sums of the moments would be partitioned differently
        parts = empty_parts(delta, results, configs[0]["PIXELS"], outs)
    inputs = {"zc": None, "coefficients": None, "residual": None, "residual_channel": None, "y": None}
    inputs |= {"TRAINING": False, "RESIDUAL": "none"} | (norm or {})

    def start(config: Config) -> None:
        tiles = triton.cdiv(results, config["PIXELS"])
        _kernel[(perturbations * tiles, groups * strips)](
            delta, weight=by_tap, next_zc=next_zc, out=out, parts=parts, P=perturbations, R=pixels, C=channels,
            filters=outs, ins_of_group=ins_of_group, outs_of_group=outs_of_group, strips=strips, Q=results, H=height,
            W=width, Ho=rows, Wo=columns, tiles=tiles, blocks=triton.cdiv(ins_of_group, ins), KW=kernel_w,
            TAPS=kernel_h * kernel_w, STRIDE_H=stride[0], STRIDE_W=stride[1], PAD_H=padding[0], PAD_W=padding[1],
            DIL_H=dilation[0], DIL_W=dilation[1], NORM=norm is not None, RELU=inputs["y"] is not None,
            MOMENTS=next_zc is not None, UPCAST=os.environ.get("TRITON_INTERPRET") == "1", OUTS=across, INS=ins,
            **inputs, **config,
        )  # fmt: skip

    sizes = (
        perturbations,
        *delta.shape[1:],
        outs,
        kernel_h,
        kernel_w,
        *stride,
        groups,
        inputs["RESIDUAL"],
        delta.dtype,
    )
    launch(module, (*sizes, weight.dtype, next_zc is not None), configs, start)
    result = out.permute(0, 1, 4, 2, 3)
    return result if parts is None else (result, merged(parts, results, configs[0]["PIXELS"]))
