"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import dzkernels
from helpers import UNIT, normal
from ops.calls import BF16, Compiled, Timed, empty, row_norm, rows
from ops.case import HALF_UNIT, HALVES, Case
from ops.rows import ROWS, beside, double, every_dtype, moved_rows, norm_of

U = UNIT[torch.float32]
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 4), (3, 40, 33, 17), (2, 65, 32, 48), (2, 31, 96, 130), (2, 130, 40, 288)]


def case(p: int, r: int, k: int, m: int, scale: float) -> dict[str, Any]:
    return {
        "delta": normal(p, r, k, seed=1) * scale,
        "weight": normal(m, k, seed=2) / k**0.5,
        "residual": normal(p, r, m, seed=3) * scale,
    }


def reach(given: dict[str, Any]) -> Tensor:
    """The largest that sums of absolute values can be: |delta| |weight|^T."""
    d = double(given)
    return d["delta"].abs() @ d["weight"].abs().T


def bound(given: dict[str, Any], half: float = 0.0, tensor_cores: bool = False) -> Tensor:
    """K + 4 roundings of the sum (K + 16 on tensor cores) and what the rows are off by; with bfloat16 operands both are
    rounded by `half`."""
    rows, off = moved_rows(given["delta"], given.get("norm"))
    weight = given["weight"].double().abs().T
    off = torch.zeros_like(rows) + off * (1 + half)
    return (
        off @ weight
        + ((given["weight"].shape[1] + beside(tensor_cores)) * U + 2 * half + half**2) * rows.abs() @ weight
    )


def cases() -> Iterator[Case]:
    for k, (p, r, width, outs) in enumerate([*ROWS, (9, 150, 192, 300), (3, 70, 768, 500), (0, 2, 3, 4)]):
        for normed, residual, (dtype, out_dtype) in (
            (True, None, HALVES[k % 4]),
            (k % 2 == 0, (torch.float32, torch.bfloat16)[k % 2], HALVES[(k + 1) % 4]),
        ):
            args = case(p, r, width, outs, (0.01, 3.0)[k % 2])
            args["delta"] = args["delta"].to(dtype)
            args["residual"] = None if residual is None else args["residual"].to(residual)
            if normed:
                norm = norm_of(r, width)
                args["norm"] = norm._replace(gamma=None) if k % 3 == 1 else norm
            operands = (torch.float32, torch.bfloat16)[k // 2 % 2] if normed else dtype
            allowed = bound(args, HALF_UNIT if operands == torch.bfloat16 else 0.0, tensor_cores=True)
            args |= {"operands": operands, "out_dtype": out_dtype}
            name = f"{(p, r, width, outs)}, norm={normed}, residual={residual}, {dtype} by {operands} to {out_dtype}"
            yield Case(name, args, allowed, dtype, r > 40)
    for dtype, out_dtype, operands, residual, normed in every_dtype():
        args = case(2, 21, 33, 18, 0.1)
        args["delta"] = args["delta"].to(dtype)
        args["residual"] = None if residual is None else args["residual"].to(residual)
        args |= {"norm": norm_of(21, 33) if normed else None, "operands": operands, "out_dtype": out_dtype}
        allowed = bound(args, HALF_UNIT if operands == torch.bfloat16 else 0.0, tensor_cores=True)
        name = f"every dtype, {dtype} by {operands} to {out_dtype}, {residual=}, {normed=}"
        yield Case(name, args, allowed, dtype, large=True)
    args = case(3, 70, 20, 24, 1e-2) | {"norm": norm_of(70, 20)}
    args["delta"][1, 33, 3] = args["residual"][0, 69, 2] = math.nan
    yield Case("NaN", args, bound(args, tensor_cores=True).nan_to_num(0), nan=True)


def compiled() -> Iterator[Compiled]:
    for name, count, size, width, outs, dtype in (
        ("96 to 288 norm bf16", 32, 1024, 96, 288, BF16),
        ("128 to 384 norm f32", 32, 1024, 128, 384, torch.float32),
        ("768 residual bf16", 8, 1024, 768, 768, BF16),
        ("ones norm", 1, 1, 1, 1, torch.float32),
    ):
        if "norm" in name:
            options = {"norm": row_norm(size, width), "out_dtype": dtype}
        else:
            options = {"residual": empty(count, size, outs), "out_dtype": torch.float32}
        yield Compiled(name, (empty(count, size, width, dtype=dtype), empty(outs, width)), options, count > 1)


def timed() -> Iterator[Timed]:
    def make(p: int, r: int, k: int, m: int, norm: bool) -> Any:
        delta, zc = rows(p, r, k)
        weight, one = torch.randn(m, k) / k**0.5, torch.ones(r, dtype=torch.float64)
        if norm:
            return (delta, weight, None, dzkernels.RowNorm(zc, one, torch.ones(k), 1e-5)), {}
        return (delta, weight, 1e-2 * torch.randn(p, r, m)), {}

    yield Timed("W4 norm and qkv, P 8", lambda: make(8, 1024, 96, 288, True), 2.0 * 8 * 1024 * 96 * 288)
    yield Timed("W4 projection and residual, P 8", lambda: make(8, 1024, 96, 96, False), 2.0 * 8 * 1024 * 96 * 96)
