"""mlp_difference is the change of a feed-forward layer, linear, GELU, linear, when its input moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dzkernels
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, running, strided
from ops.cases.mlp_difference import SHAPES, U, case, reach
from ops.rows import double, norm_errors, norm_of

HALF = UNIT[torch.bfloat16]


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 0.05, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_float32_against_float64(approximate: str, shape: tuple[int, ...], scale: float) -> None:
    """K + 8 roundings of a hidden difference, of which GELU takes 6; H + 2 of the second sum; one with the residual."""
    given = case(*shape, scale)  # type: ignore[call-arg]
    k, h = shape[2:4]
    for alone in (False, True):
        given |= {"residual": None} if alone else {}
        wanted = dzkernels.mlp_difference(**double(given), approximate=approximate)
        for runner in RUNNERS:
            with running(runner):
                got = dzkernels.mlp_difference(**given, approximate=approximate)
            assert got.dtype == torch.float32 and got.is_contiguous()
            assert_bounded(got, wanted, U * ((k + 8 + h + 2) * reach(given) + 2 * wanted.abs()))


@pytest.mark.parametrize("scale", [1e-3, 0.05, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16(shape: tuple[int, ...], scale: float) -> None:
    """The two weights and the change of GELU are rounded to bfloat16, and so is the result where it is asked for."""
    given = case(*shape, scale)  # type: ignore[call-arg]
    given["delta"] = given["delta"].bfloat16()
    wanted = dzkernels.mlp_difference(**double(given))
    inner = (3.1 * HALF + (sum(shape[2:4]) + 10) * U) * reach(given)
    for runner in RUNNERS:
        with running(runner):
            wide = dzkernels.mlp_difference(**given, out_dtype=torch.float32)
            assert_bounded(wide, wanted, inner + 2 * U * wanted.abs())
            got = dzkernels.mlp_difference(**given)
            assert got.dtype == torch.bfloat16
            if runner != "reference":  # which rounds from float64
                assert_exact(got, wide.bfloat16())
            low = dzkernels.mlp_difference(**{**given, "residual": given["residual"].bfloat16()})
            assert_bounded(low, wanted, inner + HALF * (given["residual"].double().abs() + 1.01 * wanted.abs() + inner))


@pytest.mark.parametrize("scale", [1e-3, 0.3])
@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_layer_norm_first(runner: str, shape: tuple[int, ...], operands: torch.dtype, scale: float) -> None:
    """As layer_norm_difference and then the two layers, from float32 or bfloat16."""
    given = case(*shape, scale)  # type: ignore[call-arg]
    norm = norm_of(*shape[1:3])
    for delta in (given["delta"], given["delta"].bfloat16()):
        given["delta"] = delta
        with running(runner):
            options = {"eps": norm.eps, "out_dtype": operands}
            inner = {**given, "delta": dzkernels.layer_norm_difference(given["delta"], *norm[:3], **options)}
            wanted = dzkernels.mlp_difference(**inner, out_dtype=torch.float32)
            got = dzkernels.mlp_difference(**given, norm=norm, operands=operands, out_dtype=torch.float32)
        if runner != "reference" and operands is torch.float32:  # the others need not round d
            assert_exact(got, wanted)
        assert_bounded(
            got, wanted, 2 * UNIT[operands] * (shape[2] + shape[3] + 20) * reach(inner) + 4 * U * wanted.abs()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runner", RUNNERS)
def test_nan_stays_in_its_row(runner: str, dtype: torch.dtype) -> None:
    given = case(3, 70, 20, 40, 24, 1e-2)
    given["delta"][1, 33, 3] = given["z"][5, 39] = given["residual"][0, 69, 2] = float("nan")
    given["delta"] = given["delta"].to(dtype)
    with running(runner):
        got = dzkernels.mlp_difference(**given)
    wanted = torch.zeros(3, 70, 24, dtype=torch.bool)
    wanted[1, 33], wanted[:, 5], wanted[0, 69, 2] = True, True, True
    assert torch.equal(got.isnan(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runner", RUNNERS)
def test_odd_memory_and_empty(runner: str, dtype: torch.dtype) -> None:
    given = case(3, 40, 5, 7, 6, 1e-2)
    given["delta"] = given["delta"].to(dtype)
    with running(runner):
        wanted = dzkernels.mlp_difference(**given)
        assert_exact(dzkernels.mlp_difference(**{name: strided(t) for name, t in given.items()}), wanted)
        none = {**given, "delta": given["delta"][:0], "residual": given["residual"][:0]}
        assert dzkernels.mlp_difference(**none).shape == (0, 40, 6)
        no_rows = {**given, "delta": given["delta"][:, :0], "residual": None, "z": given["z"][:0]}
        assert dzkernels.mlp_difference(**no_rows).shape == (3, 0, 6)


def test_other_dtypes() -> None:
    given = case(2, 3, 5, 7, 4, 1e-2)
    wanted = dzkernels.mlp_difference(**given)
    half = {**given, "delta": given["delta"].half(), "residual": given["residual"].double()}
    got = dzkernels.mlp_difference(**half)
    assert got.dtype == torch.float16
    assert_bounded(got, wanted, 2 * UNIT[torch.float16] * (reach(given) + wanted.abs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 40, 24, 50, 20), (2, 300, 16, 40, 8), (20, 3, 5, 7, 4)])
def test_threads_and_neighbours_do_not_matter(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = case(*shape, 0.05)  # type: ignore[call-arg]
    given["delta"] = given["delta"].to(dtype)
    wanted = dzkernels.mlp_difference(**given)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_exact(dzkernels.mlp_difference(**given), wanted)
    one = {**given, "delta": given["delta"][1:2], "residual": given["residual"][1:2]}
    assert_exact(dzkernels.mlp_difference(**one), wanted[1:2])
    row = {**one, "delta": one["delta"][:, 2:3], "residual": one["residual"][:, 2:3], "z": given["z"][2:3]}
    assert_exact(dzkernels.mlp_difference(**row), wanted[1:2, 2:3])


GOOD = case(3, 2, 4, 6, 5, 1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": 1.0}, TypeError, r"dz::mlp_difference: delta must be a tensor, got float"),
        ({"delta": GOOD["delta"].long()}, TypeError, r"delta must be of a floating-point dtype, got int64"),
        ({"delta": GOOD["delta"][0]}, ValueError, r"delta must be of shape \[P, R, K\], got \[2, 4\]"),
        ({"up": GOOD["up"].double()}, TypeError, r"up must be float32, got float64"),
        ({"up": GOOD["up"][:, :3]}, ValueError, r"up must be of shape \[H, K\] = \[\*, 4\], got \[6, 3\]"),
        ({"z": GOOD["z"][:1]}, ValueError, r"z must be of shape \[R, H\] = \[2, 6\], got \[1, 6\]"),
        ({"down": GOOD["down"][:, :3]}, ValueError, r"down must be of shape \[M, H\] = \[\*, 6\], got \[5, 3\]"),
        ({"down": GOOD["down"][:0]}, ValueError, r"down must be non-empty in M and H, got \[0, 6\]"),
        ({"down": GOOD["down"].to("meta")}, ValueError, r"down must be on cpu like delta, got meta"),
        ({"residual": GOOD["residual"].long()}, TypeError, r"residual must be of a floating-point dtype, got int64"),
        ({"residual": GOOD["residual"][:2]}, ValueError, r"residual must be of shape \[P, R, M\] = \[3, 2, 5\], got"),
        ({"residual": GOOD["residual"].to("meta")}, ValueError, r"residual must be on cpu like delta, got meta"),
        *norm_errors(2, 4),
        ({"operands": torch.int64}, TypeError, r"operands must be a floating-point dtype, got torch.int64"),
        ({"out_dtype": torch.int64}, TypeError, r"out_dtype must be a floating-point dtype, got torch.int64"),
        ({"approximate": "fast"}, ValueError, r"approximate must be 'none' or 'tanh', got 'fast'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.mlp_difference(**{**GOOD, **change})
