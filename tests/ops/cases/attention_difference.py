"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from helpers import UNIT, normal
from ops.calls import BF16, Compiled, Timed, empty
from ops.case import HALVES, Case

U = UNIT[torch.float32]
MOVES = ("dq", "dk", "dv")


# P, batch, T, S, D, E
Shape = tuple[int, tuple[int, ...], int, int, int, int]
SHAPES: list[Shape] = [
    (2, (3,), 1, 1, 1, 1),
    (1, (2, 2), 5, 7, 24, 33),
    (3, (2, 3), 65, 65, 8, 16),
    (2, (1,), 9, 130, 33, 70),
    (1, (2,), 70, 33, 1, 24),
]


def inputs(
    shape: Shape, step: float, causal: bool = False, moves: tuple[str, ...] = MOVES, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    perturbations, outer, rows, others, inner, width = shape
    args: dict[str, Any] = {"scale": inner**-0.5}
    sizes = {"q": (rows, inner), "k": (others, inner), "v": (others, width)}
    for seed, (name, size) in enumerate(sizes.items()):
        args[name] = normal(*outer, *size, seed=seed, dtype=torch.float64)
        args["d" + name] = None
        if "d" + name in moves:
            args["d" + name] = (normal(perturbations, *outer, *size, seed=9 + seed) * step).to(dtype)
    scores = args["scale"] * args["q"] @ args["k"].mT
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    args["p"] = scores.softmax(-1).float()
    for name in sizes:
        args[name] = args[name].float()
    return args


def wide(args: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in args.items()}


def changed(args: dict[str, Any], transform: Any) -> dict[str, Any]:
    return {name: transform(value) if isinstance(value, Tensor) else value for name, value in args.items()}


def bound(args: dict[str, Any], errors: tuple[Tensor, ...] = (torch.zeros(()),) * 3, sums: int = 1) -> Tensor:
    """The kernel's roundings, where dq, dk and dv are known but for ``errors``: n products summed are off by n + sums
    of them (1 in order, 16 on tensor cores: linear_difference), and each score by three more for the scale, its
    product and q + dq. Off by e, the scores move dA by A' (e + sum A' e). Softmax as softmax_difference promises,
    where a row far from its base depends on how far p is from a sum of 1. Then p + dA and the products."""
    a = wide(args)
    dq, dk, dv = (torch.zeros_like(a[name[1:]])[None] if a[name] is None else a[name] for name in MOVES)
    p, inner, others = a["p"], 2 * a["q"].shape[-1], 2 * a["k"].shape[-2]
    after = a["q"] + dq
    d = (a["scale"] * (dq @ a["k"].mT + after @ dk.mT)).masked_fill(p == 0, 0.0)
    off_q, off_k, off_v = (off.double().expand_as(move) for off, move in zip(errors, (dq, dk, dv), strict=True))
    far_q, far_k, far_v = after.abs() + off_q, dk.abs() + off_k, dv.abs() + off_v
    e = off_q @ (a["k"].abs() + dk.abs()).mT + far_q @ off_k.mT
    e = a["scale"] * (e + (inner + sums + 3) * U * ((dq.abs() + off_q) @ a["k"].abs().mT + far_q @ far_k.mT))
    e = e.masked_fill(p == 0, 0.0)
    worst = e.amax(-1, keepdim=True)
    m = torch.logsumexp(p.log() + d, -1, keepdim=True)
    moved = (p * torch.exp(d - m)).masked_fill(p == 0, 0.0)
    x = torch.where(d > 0, -torch.exp(d - m) * torch.expm1(-d), -torch.exp(-m).clamp_max(1e30) * torch.expm1(d))
    far = (m - worst < -0.9 * math.log(2)) | (d.amax(-1, keepdim=True) + worst > 59)
    change = (p * torch.expm1(d - m)).masked_fill(p == 0, 0.0)
    by_scores = moved * (e + (moved * e).sum(-1, keepdim=True)) * torch.exp(2 * worst)
    x = (p * x + moved * e) * torch.exp(2 * worst)
    by_softmax = 24 * U * (x + p * x.sum(-1, keepdim=True))
    by_softmax = by_softmax + torch.where(far, (p.sum(-1, keepdim=True) - 1).abs() * (moved + by_scores), 0.0)
    off = by_softmax + by_scores
    terms = (change.abs() + off) @ a["v"].abs() + (moved + off) @ far_v
    limit = off @ a["v"].abs() + (off + U * moved) @ far_v + moved @ off_v + (others + sums + 1) * U * terms
    count = next(len(a[name]) for name in MOVES if a[name] is not None)
    return limit.expand(count, *limit.shape[1:]) + 2.0**-140


def cases() -> Iterator[Case]:
    first, small, heads, wide, tall = SHAPES
    more, huge = (2, (1, 2), 9, 40, 40, 130), (4, (3, 4), 150, 197, 64, 64)
    everything, steps = "dq dk dv", (1e-8, 0.1, 30.0)
    for k, (shape, step, moved) in enumerate(
        [(shape, step, everything) for shape in (small, first, huge) for step in steps]
        + [(shape, step, everything) for shape in (wide, tall) for step in (1e-8, 0.1)]
        + [(small, 1.0, moved) for moved in ("dq", "dk", "dv", "dq dk", "dk dv")]
        + [(heads, 0.1, everything), (more, 0.03, everything), (more, 0.03, "dv")]
    ):
        dtype, out_dtype = HALVES[k % 4]
        causal = bool(k % 3)
        args = inputs(shape, step, causal, tuple(moved.split()), dtype)
        name = f"{shape}, step={step}, causal={causal}, {moved}, {dtype} to {out_dtype}"
        allowed = bound(args, sums=16)
        yield Case(name, args | {"out_dtype": out_dtype}, allowed, dtype, shape == huge)
    args = inputs((2, (3,), 5, 37, 8, 16), 0.1)
    args["p"][:, :, 20:] = 0
    args["p"] /= args["p"].sum(-1, keepdim=True)
    allowed = bound(args, sums=16)
    args["dk"][:, :, 20:] = 1e30
    yield Case("masked keys have no say", args, allowed)
    args = inputs((1, (1,), 3, 5, 4, 6), 1.0, moves=("dk",))
    args["dk"] = torch.zeros_like(args["dk"])
    args["dk"][:, :, 2] = 1e4
    yield Case("all to one key", args | {"q": args["q"].abs() + 1}, 64 * UNIT[torch.float32])


def compiled() -> Iterator[Compiled]:
    """Self-attention whose q, k and v come from one projection."""
    for name, count, samples, heads, size, width, dtype, moves in (
        ("T 128 f32", 8, 8, 12, 128, 64, torch.float32, "qkv"),
        ("T 1024 bf16", 8, 8, 12, 1024, 64, BF16, "qkv"),
        ("T 128 dv bf16", 8, 8, 12, 128, 64, BF16, "v"),
        ("ones", 1, 1, 1, 1, 1, torch.float32, "qkv"),
    ):
        base = empty(samples, size, 3, heads, width).unbind(2)
        moved = empty(count, samples, size, 3, heads, width, dtype=dtype).unbind(3)
        deltas = [d.transpose(2, 3) if part in moves else None for part, d in zip("qkv", moved, strict=True)]
        args = (*deltas, *(x.transpose(1, 2) for x in base), empty(samples, heads, size, size))
        yield Compiled(name, args, {"scale": width**-0.5}, name != "ones")


def timed() -> Iterator[Timed]:
    def make(p: int, b: int, t: int, d: int) -> Any:
        q, k, v = torch.randn(3, b, t, d)
        moved = 1e-2 * torch.randn(3, p, b, t, d)
        return (*moved, q, k, v, (q @ k.mT * d**-0.5).softmax(-1)), {"scale": d**-0.5}

    yield Timed("W4, P 4", lambda: make(4, 16 * 3, 64, 32), 8.0 * 4 * 48 * 64**2 * 32)
