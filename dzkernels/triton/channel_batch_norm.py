from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import max_of, norm_coefficients, norm_moments, relu_change
from ._config import Config, launch

# Sums are in float32 within a lane of a chunk, in float64 over lanes and chunks. Their partition, and with it their
# bits, depends on the size of a channel alone.
BLOCK = 1024
CHUNK = 8 * BLOCK


@triton.jit
def _at(m, H, W, sn, sh, sw, PLANES: tl.constexpr):
    """The offset of element m, in the order of [N, H, W], of a channel; with PLANES channels are contiguous."""
    return m if PLANES else (m // (H * W)).to(tl.int64) * sn + m // W % H * sh + m % W * sw


@triton.jit
def _moments(
    delta, channel, x, mean, parts, P, M, H, W, xn, xc, xh, xw, PLANES: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """parts[p, chunk] = (shift, sums of e, e^2 and zc e), e = d - shift."""
    # perturbations vary fastest: those of one channel share the chunk of x, which stays in L2
    p, chunk = (tl.program_id(0) % P).to(tl.int64), tl.program_id(0) // P
    c = tl.load(channel + p)
    centre = tl.load(mean + c)
    d_p, x_c = delta + p * M, x + c * xc
    # The mean of 16 elements is close enough to the mean of all to avoid cancellation in the sums.
    k, seen = tl.arange(0, 16), tl.minimum(M, 16)
    shift = tl.sum(tl.load(d_p + k.to(tl.int64) * M // seen, mask=k < seen, other=0.0), 0) / seen
    e1 = tl.zeros((BLOCK,), dtype=tl.float32)
    e2 = tl.zeros((BLOCK,), dtype=tl.float32)
    ze = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, CHUNK, BLOCK):
        m = chunk * CHUNK + first + tl.arange(0, BLOCK)
        z = tl.load(x_c + _at(m, H, W, xn, xh, xw, PLANES), mask=m < M, other=0.0)
        z = (z.to(tl.float64) - centre).to(tl.float32)
        e = tl.where(m < M, tl.load(d_p + m, mask=m < M, other=0.0) - shift, 0.0)
        e1 += e
        e2 += e * e
        ze += e * z
    to = parts + (p * tl.cdiv(M, CHUNK) + chunk) * 4
    tl.store(to, shift.to(tl.float64))
    tl.store(to + 1, tl.sum(e1.to(tl.float64), 0))
    tl.store(to + 2, tl.sum(e2.to(tl.float64), 0))
    tl.store(to + 3, tl.sum(ze.to(tl.float64), 0))


@triton.jit
def _finish(
    delta, channel, x, mean, var, gamma, parts, coefficients, M, chunks, H, W, xn, xc, xh, xw, EPS: tl.constexpr,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    c = tl.load(channel + p)
    k = tl.arange(0, CHUNKS)
    own, inside = parts + (p * chunks + k) * 4, k < chunks
    e1 = tl.sum(tl.load(own + 1, mask=inside, other=0.0), 0)
    e2 = tl.sum(tl.load(own + 2, mask=inside, other=0.0), 0)
    ze = tl.sum(tl.load(own + 3, mask=inside, other=0.0), 0)
    before, g = tl.load(var + c) + EPS, tl.load(gamma + c)
    mean_d, dvar, after = norm_moments(e1, e2, ze, tl.load(parts + p * chunks * 4), M, before)
    if after < before / 16.0:  # four bits are lost: recompute the new variance from the perturbed values
        centre = tl.load(mean + c)
        total = tl.zeros((BLOCK,), dtype=tl.float64)
        for first in range(0, M, BLOCK):
            m = first + tl.arange(0, BLOCK)
            z = tl.load(x + c * xc + _at(m, H, W, xn, xh, xw, PLANES), mask=m < M, other=0.0)
            z = (z.to(tl.float64) - centre).to(tl.float32)
            perturbed = z.to(tl.float64) + (tl.load(delta + p * M + m, mask=m < M, other=0.0).to(tl.float64) - mean_d)
            total += tl.where(m < M, perturbed * perturbed, 0.0)
        after = tl.sum(total, 0) / M + EPS
    shift, scale, zc_scale, offset = norm_coefficients(mean_d, dvar, before, after, g)
    tl.store(coefficients + p * 4, shift)
    tl.store(coefficients + p * 4 + 1, scale)
    tl.store(coefficients + p * 4 + 2, zc_scale)
    tl.store(coefficients + p * 4 + 3, offset)


@triton.jit
def _apply(
    delta, channel, x, mean, coefficients, y, gap, out, P, M, Q, H, W, Ho, Wo,
    xn, xc, xh, xw, yn, yc, yh, yw, gn, gc, gh, gw,
    TRAINING: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p, q = (tl.program_id(0) % P).to(tl.int64), tl.program_id(0) // P * BLOCK + tl.arange(0, BLOCK)
    c, inside = tl.load(channel + p), q < Q
    if TRAINING:
        centre = tl.load(mean + c)
        shift, scale = tl.load(coefficients + p * 4), tl.load(coefficients + p * 4 + 1)
        zc_scale, offset = tl.load(coefficients + p * 4 + 2), tl.load(coefficients + p * 4 + 3)
    else:
        scale = tl.load(coefficients + c)
    corner = q
    if POOL > 1:
        corner = (q // (Ho * Wo) * H + q // Wo % Ho * POOL) * W + q % Wo * POOL
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for k in range(0, POOL * POOL):
        m = corner + k // POOL * W + k % POOL
        d = tl.load(delta + p * M + m, mask=inside, other=0.0)
        if TRAINING:
            z = tl.load(x + c * xc + _at(m, H, W, xn, xh, xw, PLANES), mask=inside, other=0.0)
            z = (z.to(tl.float64) - centre).to(tl.float32)
            change = scale * (d - shift) - (zc_scale * z + offset)
        else:
            change = scale * d
        if RELU:
            change = relu_change(tl.load(y + c * yc + _at(m, H, W, yn, yh, yw, PLANES), mask=inside, other=0.0), change)
        if POOL > 1:
            change += tl.load(gap + c * gc + _at(m, H, W, gn, gh, gw, PLANES), mask=inside, other=0.0)
        best = max_of(best, change)
    tl.store(out + p * Q + q, best, mask=inside)


def run(
    delta: Tensor, channel: Tensor, x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, *, eps: float, training: bool,
    y: Tensor | None, pool: int, gap: Tensor | None,
) -> Tensor:  # fmt: skip
    delta, channel = delta.contiguous(), channel.contiguous()
    mean, var, gamma = mean.contiguous(), var.contiguous(), gamma.contiguous()
    perturbations, samples, height, width = delta.shape
    rows, columns = height // pool, width // pool
    out = torch.empty(perturbations, samples, rows, columns, dtype=torch.float32, device=delta.device)
    if perturbations == 0:
        return out
    size, results = samples * height * width, samples * rows * columns
    bases = [x if training else None, y, gap]
    planes = all(base is None or base.transpose(0, 1)[0].is_contiguous() for base in bases)
    if training:
        chunks = triton.cdiv(size, CHUNK)
        parts = torch.empty(perturbations, chunks, 4, dtype=torch.float64, device=delta.device)
        coefficients = torch.empty(perturbations, 4, dtype=torch.float32, device=delta.device)
        _moments[(perturbations * chunks,)](
            delta, channel, x, mean, parts, perturbations, size, height, width, *x.stride(), PLANES=planes,
            BLOCK=BLOCK, CHUNK=CHUNK,
        )  # fmt: skip
        _finish[(perturbations,)](
            delta, channel, x, mean, var, gamma, parts, coefficients, size, chunks, height, width, *x.stride(), EPS=eps,
            PLANES=planes, BLOCK=BLOCK, CHUNKS=triton.next_power_of_2(chunks),
        )  # fmt: skip
    else:
        coefficients = (gamma / (var + eps).sqrt()).float()
    none = (0, 0, 0, 0)

    def start(config: Config) -> None:
        _apply[(perturbations * triton.cdiv(results, config["BLOCK"]),)](
            delta, channel, x, mean, coefficients, y, gap, out, perturbations, size, results, height, width, rows,
            columns, *x.stride(), *(y.stride() if y is not None else none),
            *(gap.stride() if gap is not None else none), TRAINING=training, RELU=y is not None, POOL=pool,
            PLANES=planes, **config,
        )  # fmt: skip

    block = min(BLOCK, triton.next_power_of_2(results))
    configs = [{"BLOCK": block * k, "num_warps": warps} for k, warps in ((1, 4), (1, 8), (2, 4), (2, 8), (4, 8))]
    launch(__name__, (perturbations, results, pool, planes), configs, start)
    return out
