"""Change of the mean cross-entropy, from differences of the logits or of one input feature of the last linear layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import expm1_wide, log1p_wide


@triton.jit
def _changes(delta, own, wk, p, n, k, inside, target, N, K, LINEAR: tl.constexpr):
    """e[n, k] = d[p, n, k] - d[p, n, target[n]] in float64, 0 outside."""
    if LINEAR:
        d = tl.load(delta + p * N + n, mask=n < N, other=0.0).to(tl.float64)[:, None]
        w = tl.load(own + k * wk, mask=k < K, other=0.0).to(tl.float64)[None, :]
        e = d * (w - tl.load(own + target * wk).to(tl.float64)[:, None])
    else:
        row = (p * N + n) * K
        d = tl.load(delta + row[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float64)
        e = d - tl.load(delta + row + target, mask=n < N, other=0.0).to(tl.float64)[:, None]
    return tl.where(inside, e, 0.0)


# The change of a sample's loss with class y is log(sum_k p_k exp(d_k)) - d_y. It does not change when a constant is
# added to all d_k, so it equals log1p(sum_k p_k expm1(e_k)) with e_k = d_k - d_y, which does not cancel.
@triton.jit
def _kernel(
    delta, channel, weight, wk, wc, log_probs, probs, target, out, P, N, K,
    LINEAR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # perturbations vary fastest: they share the rows of probs, which stay in L2
    p = (tl.program_id(0) % P).to(tl.int64)
    block = tl.program_id(0) // P
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.load(target + n, mask=n < N, other=0)
    own = weight
    if LINEAR:
        own += tl.load(channel + p) * wc
    top = tl.zeros((BLOCK_N,), dtype=tl.float64)
    sum_expm1 = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (n < N)[:, None] & (k < K)[None, :]
        e = _changes(delta, own, wk, p, n, k, inside, t, N, K, LINEAR)
        prob = tl.load(probs + n[:, None] * K + k[None, :], mask=inside, other=0.0)
        top = tl.maximum(top, tl.max(e, 1))
        # clamped to stay finite; NaN stays NaN
        sum_expm1 += tl.sum(prob * expm1_wide(tl.where(e > 700.0, 700.0, e)), 1)
    near = (top <= 700.0) & (sum_expm1 > -0.5)
    change = log1p_wide(tl.where(near, sum_expm1, 0.0))
    if tl.min(near.to(tl.int32), 0) == 0:
        # The sum may be far from 1: log(sum_k exp(log p_k + e_k)), relative to the largest term.
        shift = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float64)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            inside = (n < N)[:, None] & (k < K)[None, :]
            e = _changes(delta, own, wk, p, n, k, inside, t, N, K, LINEAR)
            e += tl.load(log_probs + n[:, None] * K + k[None, :], mask=inside, other=float("-inf"))
            shift = tl.maximum(shift, tl.max(e, 1))
        total = tl.zeros((BLOCK_N,), dtype=tl.float64)
        shift = tl.where(n < N, shift, 0.0)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            inside = (n < N)[:, None] & (k < K)[None, :]
            e = _changes(delta, own, wk, p, n, k, inside, t, N, K, LINEAR)
            e += tl.load(log_probs + n[:, None] * K + k[None, :], mask=inside, other=float("-inf"))
            total += tl.sum(tl.exp(e - shift[:, None]), 1)
        change = tl.where(near, change, shift + tl.log(tl.where(n < N, total, 1.0)))
    change = tl.where(n < N, change, 0.0)
    tl.store(out + p * tl.cdiv(N, BLOCK_N) + block, tl.sum(change, 0))


def mean_change(
    delta: Tensor, log_probs: Tensor, target: Tensor, channel: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """[P] from delta = dlogits [P, N, K]; or, with channel, from delta = the difference [P, N] of that input feature
    and weight [K, C]."""
    delta, log_probs, target = delta.contiguous(), log_probs.contiguous(), target.contiguous()
    samples, classes = log_probs.shape
    perturbations = delta.shape[0]
    # The partition, and with it the bits of the sum, depends on shapes alone.
    block_k = min(1024, triton.next_power_of_2(classes))
    block_n = min(max(1, 512 // block_k), triton.next_power_of_2(samples))
    blocks = triton.cdiv(samples, block_n)
    parts = torch.empty(perturbations, blocks, dtype=torch.float64, device=delta.device)
    if perturbations > 0:
        linear = weight is not None
        _kernel[(perturbations * blocks,)](
            delta, channel.contiguous() if linear else target, weight if linear else delta,
            *(weight.stride() if linear else (0, 0)), log_probs, log_probs.exp(), target, parts,
            perturbations, samples, classes, LINEAR=linear, BLOCK_N=block_n, BLOCK_K=block_k,
        )  # fmt: skip
    return parts.sum(1) / samples
