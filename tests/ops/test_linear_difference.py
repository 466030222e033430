"""linear_difference is the change of a linear layer, with a layer norm before it and a sum after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dzkernels
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, running, strided
from ops.cases.linear_difference import SHAPES, U, case, reach
from ops.rows import double, norm_errors, norm_of

HALF = UNIT[torch.bfloat16]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_against_float64(shape: tuple[int, ...], scale: float) -> None:
    """K roundings of the sum, one with the residual."""
    given = case(*shape, scale)  # type: ignore[call-arg]
    for alone in (False, True):
        given |= {"residual": None} if alone else {}
        wanted = dzkernels.linear_difference(**double(given))
        for runner in RUNNERS:
            with running(runner):
                got = dzkernels.linear_difference(**given)
            assert got.dtype == torch.float32 and got.is_contiguous()
            assert_bounded(got, wanted, U * (shape[2] * reach(given) + 2 * wanted.abs()))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16(shape: tuple[int, ...], scale: float) -> None:
    """The weight is rounded to bfloat16, and so is the result where it is asked for."""
    given = case(*shape, scale)  # type: ignore[call-arg]
    given["delta"] = given["delta"].bfloat16()
    wanted = dzkernels.linear_difference(**double(given))
    inner = (HALF + (shape[2] + 1) * U) * reach(given)
    for runner in RUNNERS:
        with running(runner):
            wide = dzkernels.linear_difference(**given, out_dtype=torch.float32)
            assert_bounded(wide, wanted, inner + 2 * U * wanted.abs())
            got = dzkernels.linear_difference(**given)
            assert got.dtype == torch.bfloat16
            if runner != "reference":  # which rounds from float64
                assert_exact(got, wide.bfloat16())
            low = dzkernels.linear_difference(**{**given, "residual": given["residual"].bfloat16()})
            assert_bounded(low, wanted, inner + HALF * (given["residual"].double().abs() + 1.01 * wanted.abs() + inner))


@pytest.mark.parametrize("scale", [1e-3, 0.3])
@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_layer_norm_first(runner: str, shape: tuple[int, ...], operands: torch.dtype, scale: float) -> None:
    """As layer_norm_difference and then the layer, from float32 or bfloat16."""
    given, norm = case(*shape, scale), norm_of(*shape[1:3])  # type: ignore[call-arg]
    for delta in (given["delta"], given["delta"].bfloat16()):
        for gamma in (norm.gamma, None):
            given["delta"] = delta
            with running(runner):
                options = {"eps": norm.eps, "out_dtype": operands}
                inner = {**given, "delta": dzkernels.layer_norm_difference(delta, norm.zc, norm.var, gamma, **options)}
                wanted = dzkernels.linear_difference(**inner, out_dtype=torch.float32)
                known = norm._replace(gamma=gamma)
                got = dzkernels.linear_difference(**given, norm=known, operands=operands, out_dtype=torch.float32)
            if runner != "reference" and operands is torch.float32:  # the others need not round d
                assert_exact(got, wanted)
            bound = (0.0 if operands is torch.float32 else HALF) + (shape[2] + 1) * U
            assert_bounded(got, wanted, 2 * bound * reach(inner) + 4 * U * wanted.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("runner", RUNNERS)
def test_nan_stays_in_its_row(runner: str, normed: bool, dtype: torch.dtype) -> None:
    given, norm = case(3, 70, 20, 24, 1e-2), norm_of(70, 20)
    given["delta"][1, 33, 3] = given["residual"][0, 69, 2] = norm.zc[5, 19] = float("nan")
    given["delta"] = given["delta"].to(dtype)
    with running(runner):
        got = dzkernels.linear_difference(**given, norm=norm if normed else None)
    wanted = torch.zeros(3, 70, 24, dtype=torch.bool)
    wanted[1, 33], wanted[:, 5], wanted[0, 69, 2] = True, normed, True
    assert torch.equal(got.isnan(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runner", RUNNERS)
def test_odd_memory_and_empty(runner: str, dtype: torch.dtype) -> None:
    given, norm = case(3, 40, 5, 6, 1e-2), norm_of(40, 5)
    given["delta"] = given["delta"].to(dtype)
    odd = dzkernels.RowNorm(*(strided(t) for t in norm[:3]), norm.eps)
    with running(runner):
        wanted = dzkernels.linear_difference(**given, norm=norm)
        assert_exact(dzkernels.linear_difference(**{n: strided(t) for n, t in given.items()}, norm=odd), wanted)
        none = {**given, "delta": given["delta"][:0], "residual": given["residual"][:0]}
        assert dzkernels.linear_difference(**none, norm=norm).shape == (0, 40, 6)
        no_rows = {**given, "delta": given["delta"][:, :0], "residual": None}
        assert dzkernels.linear_difference(**no_rows).shape == (3, 0, 6)


def test_other_dtypes() -> None:
    given = case(2, 3, 5, 4, 1e-2)
    wanted = dzkernels.linear_difference(**given)
    half = {**given, "delta": given["delta"].half(), "residual": given["residual"].double()}
    got = dzkernels.linear_difference(**half)
    assert got.dtype == torch.float16
    assert_bounded(got, wanted, 2 * UNIT[torch.float16] * (reach(given) + wanted.abs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 40, 24, 20), (2, 300, 16, 56), (20, 3, 5, 4)])
def test_threads_and_neighbours_do_not_matter(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given, norm = case(*shape, 0.05), norm_of(*shape[1:3])  # type: ignore[call-arg]
    given["delta"] = given["delta"].to(dtype)
    wanted = dzkernels.linear_difference(**given, norm=norm)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_exact(dzkernels.linear_difference(**given, norm=norm), wanted)
    one = {**given, "delta": given["delta"][1:2], "residual": given["residual"][1:2]}
    assert_exact(dzkernels.linear_difference(**one, norm=norm), wanted[1:2])
    row = {**one, "delta": one["delta"][:, 2:3], "residual": one["residual"][:, 2:3]}
    known = norm._replace(zc=norm.zc[2:3], var=norm.var[2:3])
    assert_exact(dzkernels.linear_difference(**row, norm=known), wanted[1:2, 2:3])


GOOD = case(3, 2, 4, 5, 1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": 1.0}, TypeError, r"dz::linear_difference: delta must be a tensor, got float"),
        ({"delta": GOOD["delta"].long()}, TypeError, r"delta must be of a floating-point dtype, got int64"),
        ({"delta": GOOD["delta"][0]}, ValueError, r"delta must be of shape \[P, R, K\], got \[2, 4\]"),
        ({"weight": GOOD["weight"].double()}, TypeError, r"weight must be float32, got float64"),
        ({"weight": GOOD["weight"][:, :3]}, ValueError, r"weight must be of shape \[M, K\] = \[\*, 4\], got \[5, 3\]"),
        ({"weight": GOOD["weight"][:0]}, ValueError, r"weight must be non-empty in M and K, got \[0, 4\]"),
        ({"weight": GOOD["weight"].to("meta")}, ValueError, r"weight must be on cpu like delta, got meta"),
        ({"residual": GOOD["residual"].long()}, TypeError, r"residual must be of a floating-point dtype, got int64"),
        ({"residual": GOOD["residual"][:2]}, ValueError, r"residual must be of shape \[P, R, M\] = \[3, 2, 5\], got"),
        ({"residual": GOOD["residual"].to("meta")}, ValueError, r"residual must be on cpu like delta, got meta"),
        *norm_errors(2, 4),
        ({"operands": torch.int64}, TypeError, r"operands must be a floating-point dtype, got torch.int64"),
        ({"out_dtype": torch.int64}, TypeError, r"out_dtype must be a floating-point dtype, got torch.int64"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.linear_difference(**{**GOOD, **change})
