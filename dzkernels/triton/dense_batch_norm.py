from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import max_of, norm_coefficients, norm_moments, relu_change
from ._config import Config, launch

# A tile has ROWS pixels and a few channels; a chunk is at most LOOPS tiles. Each element of a tile sums its chunk in
# float32; the total of a chunk is summed in float64 and rounded to float32; chunks are merged in float64. The
# partition, and with it the bits of the sums, depends on the shape of one perturbation alone.
TILE = 1024
LOOPS = 32
PARTS: tl.constexpr = tl.constexpr(5)  # values stored per chunk and channel: the rows of `parts`
_HALVES = (torch.float32, torch.bfloat16)


@triton.jit
def _moments(
    delta, zc, parts, P, R, C, chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOOPS: tl.constexpr
):  # fmt: skip
    """parts[p, chunk] = (shift, sums of e, e^2, zc e and zc) of each channel, e = d - shift."""
    # perturbations vary fastest: they share the chunk of zc, which stays in L2
    p, chunk = (tl.program_id(0) % P).to(tl.int64), tl.program_id(0) // P
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    d_p, first = delta + p * R * C, chunk * LOOPS * ROWS
    # The mean of 8 pixels of the chunk is close enough to the mean of all to avoid cancellation in the sums.
    size = tl.minimum(LOOPS * ROWS, R - first)
    k, seen = tl.arange(0, 8), tl.minimum(size, 8)
    some = tl.load(
        d_p + (first + k.to(tl.int64) * size // seen)[:, None] * C + c[None, :],
        mask=(k < seen)[:, None] & (c < C)[None, :],
        other=0.0,
    ).to(tl.float32)
    shift = tl.sum(some, 0) / seen
    e1 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    e2 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    ze = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    zs = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for loop in range(0, LOOPS):
        r = first + loop * ROWS + tl.arange(0, ROWS)
        inside = (r < R)[:, None] & (c < C)[None, :]
        at = r.to(tl.int64)[:, None] * C + c[None, :]
        d = tl.load(d_p + at, mask=inside, other=0.0).to(tl.float32)
        e = tl.where(inside, d - shift[None, :], 0.0)
        e1 += e
        e2 += e * e
        z = tl.load(zc + at, mask=inside, other=0.0)
        ze += e * z
        zs += z
    to = parts + (p * chunks + chunk) * PARTS * C + c
    tl.store(to, shift, mask=c < C)
    tl.store(to + C, tl.sum(e1.to(tl.float64), 0).to(tl.float32), mask=c < C)
    tl.store(to + 2 * C, tl.sum(e2.to(tl.float64), 0).to(tl.float32), mask=c < C)
    tl.store(to + 3 * C, tl.sum(ze.to(tl.float64), 0).to(tl.float32), mask=c < C)
    tl.store(to + 4 * C, tl.sum(zs.to(tl.float64), 0).to(tl.float32), mask=c < C)


@triton.jit
def _merge(parts, moments, R, C, chunks, size, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr):
    """moments[p] = (mean of d, change of the variance) from the parts of chunks of `size` pixels, in their order."""
    p, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    own = parts + p * chunks * PARTS * C
    # sums of all chunks are converted to the shift of the first
    about = tl.load(own + c, mask=c < C, other=0.0).to(tl.float64)
    e1 = tl.zeros((COLUMNS,), dtype=tl.float64)
    e2 = tl.zeros((COLUMNS,), dtype=tl.float64)
    ze = tl.zeros((COLUMNS,), dtype=tl.float64)
    zs = tl.zeros((COLUMNS,), dtype=tl.float64)
    for first in range(0, chunks, AT_ONCE):
        k = first + tl.arange(0, AT_ONCE)
        sums, known = own + k[:, None] * PARTS * C + c[None, :], (k < chunks)[:, None] & (c < C)[None, :]
        pixels = tl.minimum(size, R - k * size).to(tl.float64)[:, None]
        away = tl.where(known, tl.load(sums, mask=known, other=0.0).to(tl.float64) - about[None, :], 0.0)
        sum_e = tl.load(sums + C, mask=known, other=0.0).to(tl.float64)
        e1 += tl.sum(sum_e + away * pixels, 0)
        e2 += tl.sum(tl.load(sums + 2 * C, mask=known, other=0.0) + away * (2.0 * sum_e + away * pixels), 0)
        sum_z = tl.load(sums + 4 * C, mask=known, other=0.0)
        ze += tl.sum(tl.load(sums + 3 * C, mask=known, other=0.0) + away * sum_z, 0)
        zs += tl.sum(sum_z.to(tl.float64), 0)
    mean_d, dvar, _ = norm_moments(e1, e2, ze - e1 / R * zs, about, R, 0.0)
    tl.store(moments + p * 2 * C + c, mean_d, mask=c < C)
    tl.store(moments + (p * 2 + 1) * C + c, dvar, mask=c < C)


@triton.jit
def _coefficients(
    delta, zc, var, gamma, moments, coefficients, R, C, EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    p, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    before = tl.load(var + c, mask=c < C, other=1.0) + EPS
    g = tl.load(gamma + c, mask=c < C, other=0.0)
    mean_d = tl.load(moments + p * 2 * C + c, mask=c < C, other=0.0)
    dvar = tl.load(moments + (p * 2 + 1) * C + c, mask=c < C, other=0.0)
    after = before + dvar
    vanishing = after < before / 16.0
    if tl.max(vanishing.to(tl.int32), 0) > 0:  # four bits are lost: recompute that variance from the perturbed values
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float64)
        for first in range(0, R, ROWS):
            r = first + tl.arange(0, ROWS)
            inside = (r < R)[:, None] & (c < C)[None, :]
            at = r.to(tl.int64)[:, None] * C + c[None, :]
            d = tl.load(delta + p * R * C + at, mask=inside, other=0.0).to(tl.float64)
            perturbed = tl.load(zc + at, mask=inside, other=0.0).to(tl.float64) + (d - mean_d[None, :])
            total += tl.where(inside, perturbed * perturbed, 0.0)
        after = tl.where(vanishing, tl.sum(total, 0) / R + EPS, after)
    shift, scale, zc_scale, offset = norm_coefficients(mean_d, dvar, before, after, g)
    to = coefficients + p * 4 * C + c
    tl.store(to, shift, mask=c < C)
    tl.store(to + C, scale, mask=c < C)
    tl.store(to + 2 * C, zc_scale, mask=c < C)
    tl.store(to + 3 * C, offset, mask=c < C)


@triton.jit
def change_at(
    delta, zc, coefficients, residual, residual_channel, y, p, r, c, known, R, C,
    TRAINING: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Change of the activation of perturbation p at pixels r and channels c; `known` says which of r are pixels.

    RESIDUAL: "none", "dense" or "channel"
    """
    at, inside = r[:, None] * C + c[None, :], known[:, None] & (c < C)[None, :]
    d = tl.load(delta + p * R * C + at, mask=inside, other=0.0).to(tl.float32)
    if TRAINING:
        own = coefficients + p * 4 * C + c
        shift = tl.load(own, mask=c < C, other=0.0)[None, :]
        scale = tl.load(own + C, mask=c < C, other=0.0)[None, :]
        zc_scale = tl.load(own + 2 * C, mask=c < C, other=0.0)[None, :]
        offset = tl.load(own + 3 * C, mask=c < C, other=0.0)[None, :]
        change = scale * (d - shift) - (zc_scale * tl.load(zc + at, mask=inside, other=0.0) + offset)
    else:
        change = tl.load(coefficients + c, mask=c < C, other=0.0)[None, :] * d
    if RESIDUAL == "dense":
        change += tl.load(residual + p * R * C + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL == "channel":
        moved = tl.load(residual + p * R + r, mask=known, other=0.0)[:, None]
        change += tl.where(c[None, :] == tl.load(residual_channel + p), moved, 0.0)
    if RELU:
        change = relu_change(tl.load(y + at, mask=inside, other=0.0), change)
    return change


@triton.jit
def _apply(
    delta, zc, coefficients, residual, residual_channel, y, gap, out, P, R, C, Q, H, W, Ho, Wo,
    TRAINING: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    p, q = (tl.program_id(0) % P).to(tl.int64), tl.program_id(0) // P * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (q < Q)[:, None] & (c < C)[None, :]
    corner = q.to(tl.int64)
    if POOL > 1:
        corner = (corner // (Ho * Wo) * H + q // Wo % Ho * POOL) * W + q % Wo * POOL
    best = tl.full((ROWS, COLUMNS), float("-inf"), dtype=tl.float32)
    for k in range(0, POOL * POOL):
        r = corner + k // POOL * W + k % POOL
        change = change_at(
            delta, zc, coefficients, residual, residual_channel, y, p, r, c, q < Q, R, C, TRAINING, RESIDUAL, RELU
        )
        if POOL > 1:
            change += tl.load(gap + r[:, None] * C + c[None, :], mask=inside, other=0.0)
        best = max_of(best, change)
    tl.store(out + (p * Q + q)[:, None] * C + c[None, :], best, mask=inside)


def coefficients_of(
    delta: Tensor, zc: Tensor, var: Tensor, gamma: Tensor, eps: float, training: bool, moments: Tensor | None
) -> Tensor:
    """The coefficients that change_at reads: [P, 4, C] for delta [P, N, H, W, C], or [C] without training."""
    if not training:
        return (gamma / (var + eps).sqrt()).float()
    perturbations, samples, height, width, channels = delta.shape
    pixels, across = samples * height * width, columns_of(channels)
    rows, strips = TILE // across, triton.cdiv(channels, across)
    if moments is None:
        loops = min(LOOPS, triton.next_power_of_2(triton.cdiv(pixels, rows)))
        parts = empty_parts(delta, pixels, rows * loops, channels)
        _moments[(perturbations * parts.shape[1], strips)](
            delta, zc, parts, perturbations, pixels, channels, parts.shape[1], ROWS=rows, COLUMNS=across, LOOPS=loops
        )
        moments = merged(parts, pixels, rows * loops)
    coefficients = torch.empty(perturbations, 4, channels, dtype=torch.float32, device=delta.device)
    _coefficients[(perturbations, strips)](
        delta, zc, var, gamma, moments.contiguous(), coefficients, pixels, channels, EPS=eps, ROWS=rows, COLUMNS=across
    )
    return coefficients


def empty_parts(delta: Tensor, pixels: int, size: int, channels: int) -> Tensor:
    """[P, chunks of `size` pixels, PARTS, C] for the perturbations and on the device of delta."""
    chunks = triton.cdiv(pixels, size)
    return torch.empty(len(delta), chunks, PARTS.value, channels, dtype=torch.float32, device=delta.device)


def merged(parts: Tensor, pixels: int, size: int) -> Tensor:
    """moments [P, 2, C] float64 from the parts of chunks of `size` pixels."""
    perturbations, chunks, _, channels = parts.shape
    moments = torch.empty(perturbations, 2, channels, dtype=torch.float64, device=parts.device)
    across = columns_of(channels)
    _merge[(perturbations, triton.cdiv(channels, across))](
        parts, moments, pixels, channels, chunks, size, COLUMNS=across,
        AT_ONCE=min(TILE // across, triton.next_power_of_2(chunks)),
    )  # fmt: skip
    return moments


def columns_of(channels: int) -> int:
    return min(64, triton.next_power_of_2(channels))


def kind_of_residual(residual: Tensor | None, channel: Tensor | None) -> tuple[str, Tensor | None, Tensor | None]:
    """(RESIDUAL, residual, residual_channel) as change_at takes them."""
    if residual is None:
        return "none", None, None
    residual = channels_last(residual) if channel is None else residual.contiguous()
    residual = residual if residual.dtype in _HALVES else residual.float()
    return ("dense", residual, None) if channel is None else ("channel", residual, channel.contiguous())


def run(
    delta: Tensor, zc: Tensor, var: Tensor, gamma: Tensor, *, eps: float, training: bool, residual: Tensor | None,
    residual_channel: Tensor | None, y: Tensor | None, pool: int, gap: Tensor | None, out_dtype: torch.dtype,
    moments: Tensor | None,
) -> Tensor:  # fmt: skip
    delta, zc, var, gamma = channels_last(delta), channels_last(zc), var.contiguous(), gamma.contiguous()
    kind, residual, residual_channel = kind_of_residual(residual, residual_channel)
    y, gap = channels_last(y) if y is not None else None, channels_last(gap) if gap is not None else None
    perturbations, samples, height, width, channels = delta.shape
    rows, columns = height // pool, width // pool
    inner = out_dtype if out_dtype in _HALVES else torch.float32
    out = torch.empty(perturbations, samples, rows, columns, channels, dtype=inner, device=delta.device)
    if perturbations > 0:
        pixels, results = samples * height * width, samples * rows * columns
        across = columns_of(channels)
        down, strips = TILE // across, triton.cdiv(channels, across)
        coefficients = coefficients_of(delta, zc, var, gamma, eps, training, moments)

        def start(config: Config) -> None:
            _apply[(perturbations * triton.cdiv(results, config["ROWS"]), strips)](
                delta, zc, coefficients, residual, residual_channel, y, gap, out, perturbations, pixels, channels,
                results, height, width, rows, columns, TRAINING=training, RESIDUAL=kind, RELU=y is not None, POOL=pool,
                COLUMNS=across, **config,
            )  # fmt: skip

        configs = [{"ROWS": down * k, "num_warps": warps} for k, warps in ((1, 4), (1, 8), (2, 4), (2, 8), (4, 8))]
        traffic = (perturbations, results, channels, pool, delta.dtype, kind, inner)
        launch(__name__, traffic, configs, start)
    return out.to(out_dtype).permute(0, 1, 4, 2, 3)


def channels_last(values: Tensor) -> Tensor:
    """[..., C, H, W] as contiguous [..., H, W, C]; no copy if it is already laid out so."""
    return values.movedim(-3, -1).contiguous()
