"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from helpers import UNIT, normal
from ops.calls import BF16, Compiled, Timed, empty, row_norm, rows
from ops.case import HALF_UNIT, HALVES, Case
from ops.cases import gelu_difference
from ops.rows import ROWS, beside, double, every_dtype, moved_rows, norm_of

SLOPE = 1.13  # the largest of GELU
U = UNIT[torch.float32]


SHAPES = [(1, 1, 1, 1, 1), (2, 3, 5, 7, 4), (3, 40, 33, 50, 17), (2, 65, 32, 64, 48), (2, 31, 96, 130, 80)]


def case(p: int, r: int, k: int, h: int, m: int, scale: float) -> dict[str, Any]:
    return {
        "delta": normal(p, r, k, seed=1) * scale,
        "up": normal(h, k, seed=2) / k**0.5,
        "z": 2 * normal(r, h, seed=3),
        "down": normal(m, h, seed=4) / h**0.5,
        "residual": normal(p, r, m, seed=5) * scale,
    }


def reach(given: dict[str, Any]) -> Tensor:
    """The largest that sums of absolute values can be: SLOPE |delta| |up|^T |down|^T."""
    d = double(given)
    return SLOPE * d["delta"].abs() @ d["up"].abs().T @ d["down"].abs().T


def bound(given: dict[str, Any], half: float = 0.0, tensor_cores: bool = False) -> Tensor:
    """K + 4 roundings of a hidden difference and what the rows are off by, 6 of GELU, H + 4 of the second sum (16 for
    each 4 on tensor cores); with bfloat16 operands each of them is rounded by `half`."""
    more = beside(tensor_cores)
    rows, off = moved_rows(given["delta"], given.get("norm"))
    up, down = given["up"].double().abs().T, given["down"].double().abs().T
    hidden = rows.abs() @ up
    first = (torch.zeros_like(rows) + off * (1 + half)) @ up + ((len(up) + more) * U + 2 * half + half**2) * hidden
    second = ((len(down) + more + 6) * U + 2 * half + half**2) * (hidden + first)
    return SLOPE * (first + second) @ down


def cases() -> Iterator[Case]:
    large = [(9, 150, 192, 300, 192), (3, 70, 100, 400, 300)]
    for k, (p, r, width, outs) in enumerate([*ROWS, (0, 2, 3, 4), *(row[:3] + row[4:] for row in large)]):
        hidden = large[k - 7][3] if k > 6 else (130, 50, 1, 40, 33, 20, 5)[k]
        for normed, residual, (dtype, out_dtype) in (
            (True, None, HALVES[k % 4]),
            (k % 2 == 0, (torch.float32, torch.bfloat16)[k % 2], HALVES[(k + 1) % 4]),
        ):
            args = case(p, r, width, hidden, outs, (0.01, 3.0)[k % 2])
            args["delta"] = args["delta"].to(dtype)
            args["residual"] = None if residual is None else args["residual"].to(residual)
            if normed:
                args["norm"] = norm_of(r, width)
            operands = (torch.float32, torch.bfloat16)[k // 2 % 2] if normed else dtype
            allowed = bound(args, HALF_UNIT if operands == torch.bfloat16 else 0.0, tensor_cores=True)
            args |= {"operands": operands, "out_dtype": out_dtype, "approximate": ("none", "tanh")[k // 2 % 2]}
            name = f"{(p, r, width, hidden, outs)}, norm={normed}, residual={residual}, {dtype} by {operands} to "
            yield Case(f"{name}{out_dtype}", args, allowed, dtype, r > 40)
    for k, (dtype, out_dtype, operands, residual, normed) in enumerate(every_dtype()):
        args = case(2, 21, 33, 40, 18, 0.1)
        args["delta"] = args["delta"].to(dtype)
        args["residual"] = None if residual is None else args["residual"].to(residual)
        args |= {"norm": norm_of(21, 33) if normed else None, "operands": operands, "out_dtype": out_dtype}
        allowed = bound(args, HALF_UNIT if operands == torch.bfloat16 else 0.0, tensor_cores=True)
        name = f"every dtype, {dtype} by {operands} to {out_dtype}, {residual=}, {normed=}"
        yield Case(name, args | {"approximate": ("none", "tanh")[k % 2]}, allowed, dtype, large=True)
    for approximate in ("none", "tanh"):  # a layer of one column shows GELU alone
        z = torch.cat([gelu_difference.SPECIAL, torch.linspace(-16, 16, 101)])[:, None]
        steps = torch.tensor([1e-30, 1e-8, 0.01, 0.125, 0.2499, 0.25, 0.2501, 0.5, 2.0, 20.0])
        delta = torch.cat([steps, -steps])[:, None, None].expand(-1, len(z), -1)
        args = {"delta": delta, "up": torch.ones(1, 1), "z": z, "down": torch.ones(1, 1), "approximate": approximate}
        yield Case(f"a sweep, {approximate}", args, bound(args, tensor_cores=True))
    args = case(3, 70, 20, 40, 24, 1e-2) | {"norm": norm_of(70, 20)}
    args["delta"][1, 33, 3] = args["z"][5, 39] = args["residual"][0, 69, 2] = math.nan
    yield Case("NaN", args, bound(args, tensor_cores=True).nan_to_num(0), nan=True)


def compiled() -> Iterator[Compiled]:
    for name, count, size, width, hidden, dtype in (
        ("96 bf16", 32, 1024, 96, 384, BF16),
        ("96 tanh bf16", 32, 1024, 96, 384, BF16),
        ("256 bf16", 32, 1024, 256, 1024, BF16),
        ("128 f32", 32, 1024, 128, 512, torch.float32),
        ("ones", 1, 1, 1, 1, torch.float32),
    ):
        layers = empty(hidden, width), empty(size, hidden), empty(width, hidden)
        args = empty(count, size, width, dtype=dtype), *layers, empty(count, size, width), row_norm(size, width)
        form = "tanh" if "tanh" in name else "none"
        yield Compiled(name, args, {"approximate": form, "operands": dtype, "out_dtype": torch.float32}, count > 1)


def timed() -> Iterator[Timed]:
    def make(p: int, r: int, m: int, h: int) -> Any:
        delta, _ = rows(p, r, m)
        return (delta, torch.randn(h, m) / m**0.5, torch.randn(r, h), torch.randn(m, h) / h**0.5), {}

    yield Timed("W4, P 8", lambda: make(8, 1024, 96, 384), 4.0 * 8 * 1024 * 96 * 384)
