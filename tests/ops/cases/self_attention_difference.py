"""Inputs, the rows of the table, and what the results are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import dzkernels
from helpers import UNIT, assert_exact, normal
from ops.calls import BF16, Compiled, Timed, empty, row_norm, rows
from ops.case import HALF_UNIT, Case
from ops.cases import attention_difference, linear_difference
from ops.rows import beside, moved_rows

U = UNIT[torch.float32]
Shape = tuple[int, int, int, int, int, int, int, int]  # P, N, H, T, D, E, K, M


SHAPES: list[Shape] = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (2, 2, 3, 5, 4, 6, 7, 9),
    (3, 1, 2, 64, 16, 16, 32, 32),
    (2, 2, 1, 33, 24, 17, 20, 40),
    (1, 2, 2, 70, 8, 80, 33, 18),
]


def case(shape: Shape, scale: float) -> dict[str, Any]:
    p, n, h, t, d, e, k, m = shape
    z = normal(n * t, k, seed=1)
    zc = z - z.mean(1, keepdim=True)
    q, key = normal(n, h, t, d, seed=2), normal(n, h, t, d, seed=3)
    factor = d**-0.5
    return {
        "delta": normal(p, n * t, k, seed=4) * scale,
        "weight": normal(h, 2 * d + e, k, seed=5) / k**0.5,
        "q": q,
        "k": key,
        "v": normal(n, h, t, e, seed=6),
        "p": (factor * q.double() @ key.double().mT).softmax(-1).float(),
        "project": normal(m, h * e, seed=7) / (h * e) ** 0.5,
        "residual": normal(p, n * t, m, seed=8) * scale,
        "norm": dzkernels.RowNorm(zc, zc.double().square().mean(1), normal(k, seed=9), 1e-3),
        "scale": factor,
    }


def apart(given: dict[str, Any], operands: torch.dtype, between: torch.dtype) -> Tensor:
    """The three ops that it is made of; ``between`` is what the change of the attention is rounded to."""
    wide = torch.float64 if given["q"].dtype is torch.float64 else torch.float32
    moved = dzkernels.linear_difference(
        given["delta"], given["weight"].flatten(0, 1), norm=given["norm"], operands=operands, out_dtype=wide
    )
    base = [given[name] for name in ("q", "k", "v", "p")]
    moves = heads_of(moved, given)
    change = dzkernels.attention_difference(*moves, *base, scale=given["scale"], out_dtype=between)
    rows = change.transpose(2, 3).reshape(*given["delta"].shape[:2], -1)
    return dzkernels.linear_difference(rows, given["project"], given["residual"], operands=operands, out_dtype=wide)


def check_also(given: dict[str, Any]) -> None:
    """Triton's kernel is its three parts one after the other, bit for bit."""
    operands = given.get("operands", torch.float32)
    got = dzkernels.self_attention_difference(**{**given, "out_dtype": torch.float32})
    assert_exact(got, apart(given, operands, operands))


def heads_of(rows: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """The queries, keys and values [P, N, H, T, .] among the features [P, N T, H (2 D + E)] of the first layer."""
    (n, h, t, d), e = given["q"].shape, given["v"].shape[3]
    return rows.reshape(-1, n, t, h, 2 * d + e).transpose(2, 3).split([d, d, e], -1)


def bound(given: dict[str, Any], half: float = 0.0, tensor_cores: bool = False) -> Tensor:
    """What the linear layer is off by goes through the attention, and what that is off by through the layer after it,
    element by element. With bfloat16 operands that hold delta and the weights the change of the attention alone is
    rounded, by ``half``."""
    weight, project = given["weight"].flatten(0, 1), given["project"].double().abs().T
    first = {"delta": given["delta"], "norm": given["norm"]}
    features = moved_rows(**first)[0] @ weight.double().T
    errors = heads_of(linear_difference.bound({**first, "weight": weight}, tensor_cores=tensor_cores), given)
    args = dict(zip(attention_difference.MOVES, heads_of(features, given), strict=True))
    args |= {name: given[name] for name in ("q", "k", "v", "p", "scale")}
    wanted = dzkernels.attention_difference(**attention_difference.wide(args))
    off = attention_difference.bound(args, errors, sums=16 if tensor_cores else 1)
    rows, off = (values.transpose(2, 3).reshape(*given["delta"].shape[:2], -1) for values in (wanted.abs(), off))
    off = off + half * (rows + off)
    return (off + (given["project"].shape[1] + beside(tensor_cores)) * U * (rows + off)) @ project


def cases() -> Iterator[Case]:
    """Small steps: where the change is nearly linear the allowed tells a wrong term from a rounding."""
    for shape in (*SHAPES[:2], (3, 2, 2, 9, 16, 8, 24, 20)):
        for change in ({}, {"residual": None, "norm": None}):
            args = case(shape, 1e-2) | change
            yield Case(
                f"{shape}, {'alone' if change else 'whole'}",
                args,
                bound(args, tensor_cores=True),
            )
    for dtype, out_dtype in ((torch.bfloat16, torch.float32), (torch.bfloat16,) * 2, (torch.float32,) * 2):
        args = case((2, 2, 2, 5, 4, 6, 7, 9), 1e-2) | {"residual": None, "norm": None}
        for name in ("delta", "weight", "project"):
            args[name] = args[name].bfloat16().float()  # so that the change of the attention alone is rounded
        allowed = bound(args, HALF_UNIT, tensor_cores=True)
        args["delta"] = args["delta"].to(dtype)
        args |= {"operands": torch.bfloat16, "out_dtype": out_dtype}
        yield Case(f"{dtype} by bfloat16 to {out_dtype}", args, allowed, dtype)
    args = case((2, 3, 2, 5, 4, 6, 7, 9), 1e-2)
    args["delta"][1, 7, 3] = math.nan
    yield Case(
        "NaN",
        args,
        bound({**args, "delta": args["delta"].nan_to_num(0)}, tensor_cores=True),
        nan=True,
    )


def compiled() -> Iterator[Compiled]:
    heads = empty(16, 3, 64, 32)
    args = (
        empty(32, 16 * 64, 96), empty(3, 96, 96), heads, heads, heads, empty(16, 3, 64, 64), empty(96, 96),
        empty(32, 16 * 64, 96), row_norm(16 * 64, 96),
    )  # fmt: skip
    yield Compiled("96 norm residual bf16", args, {"scale": 32**-0.5, "operands": BF16})


def timed() -> Iterator[Timed]:
    def make(p: int, n: int, h: int, t: int, d: int) -> Any:
        k = h * d
        delta, zc = rows(p, n * t, k)
        q, key, v = torch.randn(3, n, h, t, d)
        probs = (q @ key.mT * d**-0.5).softmax(-1)
        norm = dzkernels.RowNorm(zc, torch.ones(n * t, dtype=torch.float64), torch.ones(k), 1e-5)
        weight, project = torch.randn(h, 3 * d, k) / k**0.5, torch.randn(k, k) / k**0.5
        return (delta, weight, q, key, v, probs, project, delta, norm), {"scale": d**-0.5}

    flops = 8.0 * 8 * 1024 * 96**2 + 8.0 * 8 * 48 * 64**2 * 32
    yield Timed("W4, P 8", lambda: make(8, 16, 3, 64, 32), flops)
