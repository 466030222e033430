"""gelu_difference is the change of GELU when its input moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dzkernels
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, normal, running, strided
from ops.cases.gelu_difference import SPECIAL, U, bound, exact

FORMS = ["none", "tanh"]


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-4, 1e-2, 0.25, 1.0, 10.0])
@pytest.mark.parametrize("approximate", FORMS)
def test_against_many_digits(approximate: str, scale: float) -> None:
    z = torch.cat([SPECIAL, 2 * normal(37, seed=1)])
    delta = normal(3, z.numel(), seed=2) * scale
    wanted = exact(delta, z, approximate)
    for runner in RUNNERS:
        with running(runner):
            got = dzkernels.gelu_difference(delta, z, approximate=approximate)
        assert got.dtype == torch.float32
        assert_bounded(got, wanted, bound(delta))
    wide = dzkernels.gelu_difference(delta.double(), z.double(), approximate=approximate)
    # Quadrature nodes with 15 digits; past 1/8 the plain difference, off by a rounding of |z| + |d|.
    size = delta.double().abs() * (1 + 8 * (z.double().abs() + delta.double().abs()) * (delta.abs() > 0.125))
    assert_bounded(wide, wanted, 32 * UNIT[torch.float64] * size)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 0.2, 0.3, 3.0])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 4, 97), (3, 2, 5, 103), (2, 513), (9, 1025), (2, 2000)])
@pytest.mark.parametrize("approximate", FORMS)
def test_backends_agree(approximate: str, shape: tuple[int, ...], scale: float) -> None:
    z, delta = 2 * normal(*shape[1:], seed=1), normal(*shape, seed=2) * scale
    wanted = dzkernels.gelu_difference(delta.double(), z.double(), approximate=approximate)
    for runner in RUNNERS:
        with running(runner):
            got = dzkernels.gelu_difference(delta, z, approximate=approximate)
        assert got.is_contiguous()
        assert_bounded(got, wanted, bound(delta))


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_sweep_of_the_base(runner: str, approximate: str) -> None:
    """Every region of z, with |d| on both sides of where the series ends, and exactly there."""
    z = torch.linspace(-16, 16, 8001)
    steps = torch.tensor([1e-8, 0.125, 0.2499, 0.25, 0.2501, 0.5, 2.0, 20.0])
    delta = torch.cat([steps, -steps])[:, None].expand(-1, z.numel())
    wanted = dzkernels.gelu_difference(delta.double(), z.double(), approximate=approximate)
    with running(runner):
        assert_bounded(dzkernels.gelu_difference(delta, z, approximate=approximate), wanted, bound(delta))


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_the_tails(runner: str, approximate: str) -> None:
    """Far right a change passes unchanged, far left nothing does, and an infinite change gives what is left."""
    z = torch.tensor([30.0, 1e30, -30.0, -1e30, 2.0, -2.0])
    inf = float("inf")
    with running(runner):
        small = dzkernels.gelu_difference(torch.full((1, 6), 1e-3), z, approximate=approximate)[0]
        up = dzkernels.gelu_difference(torch.full((1, 6), inf), z, approximate=approximate)[0]
        down = dzkernels.gelu_difference(
            torch.full((1, 6), -1e30), z[4:].expand(3, 2).flatten(), approximate=approximate
        )
    assert_exact(small[:2], torch.tensor([1e-3, 1e-3]))
    assert_exact(small[2:4], torch.zeros(2))
    if runner != "reference":  # gelu(-inf) of torch is NaN
        assert (up[[0, 2, 4, 5]] == inf).all()
    left = exact(torch.full((1, 2), -100.0), z[4:], approximate)[0]
    assert_bounded(down[0, :2], left, 8 * U * left.abs())


@pytest.mark.parametrize("runner", RUNNERS)
def test_nan_stays_in_its_place(runner: str) -> None:
    z, delta = normal(40, seed=1), normal(3, 40, seed=2)
    z[7], delta[1, 9] = float("nan"), float("nan")
    with running(runner):
        got = dzkernels.gelu_difference(delta, z)
    wanted = torch.zeros(3, 40, dtype=torch.bool)
    wanted[:, 7], wanted[1, 9] = True, True
    assert torch.equal(got.isnan(), wanted)


@pytest.mark.parametrize("runner", RUNNERS)
def test_odd_memory_and_empty(runner: str) -> None:
    z, delta = normal(5, 7, seed=1), normal(3, 5, 7, seed=2)
    with running(runner):
        wanted = dzkernels.gelu_difference(delta, z)
        assert_exact(dzkernels.gelu_difference(strided(delta), strided(z)), wanted)
        assert_exact(dzkernels.gelu_difference(delta.mT, z.mT), wanted.mT.contiguous())
        assert dzkernels.gelu_difference(delta[:0], z).shape == (0, 5, 7)
        assert dzkernels.gelu_difference(delta[:, :0], z[:0]).shape == (3, 0, 7)
        assert dzkernels.gelu_difference(delta[:, 0, 0], z[0, 0]).shape == (3,)


@pytest.mark.parametrize("scale", [1e-3, 0.2, 3.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 103), (4, 16, 32), (2, 513), (3, 1030)])
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_bfloat16_in_and_out(runner: str, approximate: str, shape: tuple[int, ...], scale: float) -> None:
    """As in float32, with the result rounded once."""
    z, delta = 2 * normal(*shape[1:], seed=1), (normal(*shape, seed=2) * scale).bfloat16()
    with running(runner):
        wide = dzkernels.gelu_difference(delta.float(), z, approximate=approximate)
        for given in (delta, delta.float()):
            for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
                got = dzkernels.gelu_difference(given, z, approximate=approximate, out_dtype=out_dtype)
                if runner != "reference":  # which rounds from float64
                    assert_exact(got, wide.to(out_dtype))
                assert got.is_contiguous()
                rounding = UNIT[out_dtype] if out_dtype != torch.float32 else 0.0
                tiny = torch.finfo(out_dtype).smallest_normal * rounding
                assert_bounded(got, wide, rounding * wide.double().abs() + 2 * bound(delta) + tiny)
        assert dzkernels.gelu_difference(delta, z, approximate=approximate).dtype == torch.bfloat16


@pytest.mark.parametrize("runner", RUNNERS)
def test_bfloat16_nan_and_infinity(runner: str) -> None:
    z, delta = torch.full((37,), 0.5), torch.zeros(2, 37)
    delta[0, 3], delta[1, 36], delta[1, 5] = float("nan"), float("nan"), float("inf")
    with running(runner):
        got = dzkernels.gelu_difference(delta.bfloat16(), z)
    assert torch.equal(got.isnan(), delta.isnan())
    assert got[1, 5] == float("inf")
    assert int((got != 0).sum()) == 3


def test_other_dtypes_run_on_the_reference() -> None:
    z, delta = normal(20, seed=1), normal(3, 20, seed=2).half()
    wanted = dzkernels.gelu_difference(delta.float(), z)
    got = dzkernels.gelu_difference(delta, z)
    assert got.dtype == torch.float16
    assert_bounded(got, wanted, 2 * UNIT[torch.float16] * wanted.abs() + bound(delta))


@pytest.mark.parametrize("shape", [(7, 300), (2, 5000), (40, 3)])
def test_threads_and_neighbours_do_not_matter(shape: tuple[int, int]) -> None:
    z, delta = normal(shape[1], seed=1), normal(*shape, seed=2) * 0.2
    wanted = dzkernels.gelu_difference(delta, z)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_exact(dzkernels.gelu_difference(delta, z), wanted)
    alone = [dzkernels.gelu_difference(delta[:, i : i + 1], z[i : i + 1]) for i in range(min(50, shape[1]))]
    assert_exact(torch.cat(alone, 1), wanted[:, :50])


GOOD: dict[str, Any] = {"delta": normal(3, 2, 4, seed=1), "z": normal(2, 4, seed=2)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": 1.0}, TypeError, r"dz::gelu_difference: delta must be a tensor, got float"),
        ({"delta": GOOD["delta"].long()}, TypeError, r"delta must be of a floating-point dtype, got int64"),
        ({"delta": torch.tensor(1.0)}, ValueError, r"delta must be of shape \[P, \*s\], got \[\]"),
        ({"z": 1}, TypeError, r"z must be a tensor, got int"),
        ({"z": GOOD["z"].double()}, TypeError, r"z must be float32, got float64"),
        ({"delta": GOOD["delta"].double()}, TypeError, r"z must be float64, got float32"),
        ({"z": GOOD["z"][0]}, ValueError, r"z must be of shape \[\*s\] = \[2, 4\], got \[4\]"),
        ({"z": GOOD["z"].to("meta")}, ValueError, r"z must be on cpu like delta, got meta"),
        ({"out_dtype": torch.int64}, TypeError, r"out_dtype must be a floating-point dtype, got torch.int64"),
        ({"approximate": "fast"}, ValueError, r"approximate must be 'none' or 'tanh', got 'fast'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.gelu_difference(**{**GOOD, **change})
