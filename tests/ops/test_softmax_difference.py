"""softmax_difference is the change of softmax, or log-softmax, when its input moves."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch

import dzkernels
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, normal, running, strided
from ops.cases.softmax_difference import SHAPES, U, bound, inputs


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-4, 1e-2, 0.3, 1.0, 10.0, 60.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_against_float64(shape: tuple[int, int, int], scale: float, log: bool) -> None:
    delta, p = inputs(shape, scale)
    wanted = dzkernels.softmax_difference(delta.double(), p.double(), log=log)
    for runner in RUNNERS:
        with running(runner):
            got = dzkernels.softmax_difference(delta, p, log=log)
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        assert_bounded(got, wanted, bound(delta, p, log) + 2.0**-148)  # the last term: below the normal range


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 0.3, 3.0, 100.0])
def test_the_reference_against_many_digits(scale: float, log: bool) -> None:
    """In 60 digits, by the formula that ignores how far a row of p is from 1 while that is the smaller error."""
    delta, p = inputs((3, 2, 7), scale)
    delta, p = delta.double(), p.double() / p.double().sum(1, keepdim=True)
    got = dzkernels.softmax_difference(delta, p, log=log)
    wanted = torch.empty_like(got)
    with mpmath.workdps(60):
        for q, r in [(q, r) for q in range(3) for r in range(2)]:
            d, probs = [mpmath.mpf(v) for v in delta[q, r].tolist()], [mpmath.mpf(v) for v in p[r].tolist()]
            moved = sum(a * mpmath.expm1(v) for a, v in zip(probs, d, strict=True))
            m = (
                mpmath.log1p(moved)
                if moved > -0.5
                else mpmath.log(sum(a * mpmath.exp(v) for a, v in zip(probs, d, strict=True)))
            )
            for k in range(7):
                wanted[q, r, k] = float(d[k] - m if log else probs[k] * mpmath.expm1(d[k] - m))
    size = delta.abs() + delta.abs().amax(2, keepdim=True)
    assert_bounded(got, wanted, 16 * UNIT[torch.float64] * (size if log else size * torch.maximum(p + wanted, p)))


@pytest.mark.parametrize("runner", RUNNERS)
def test_is_a_float64_rerun(runner: str) -> None:
    logits, delta = normal(5, 33, seed=1, dtype=torch.float64), normal(4, 5, 33, seed=2)
    p = logits.softmax(1)
    with running(runner):
        got = dzkernels.softmax_difference(delta, p.float())
        log = dzkernels.softmax_difference(delta, p.float(), log=True)
    assert_bounded(got, (logits + delta).softmax(2) - p, bound(delta, p.float(), False))
    assert_bounded(log, (logits + delta).log_softmax(2) - logits.log_softmax(1), bound(delta, p.float(), True))


@pytest.mark.parametrize("runner", RUNNERS)
def test_one_moving_logit(runner: str) -> None:
    """A likely logit stands still and a very unlikely one moves: the change is of the size of the unlikely one."""
    p = torch.tensor([[1.0, 1e-6, 1e-30]])
    delta = torch.tensor([[[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]], [[0.0, -1.0, 1e-9]], [[1e-8, 0.0, 0.0]]])
    wanted = dzkernels.softmax_difference(delta.double(), p.double())
    with running(runner):
        got = dzkernels.softmax_difference(delta, p)
    assert_bounded(got, wanted, bound(delta, p, False))
    assert_bounded(got[0, 0, 0], torch.tensor(-1e-6 * math.expm1(1), dtype=torch.float64), 1e-11)


@pytest.mark.parametrize("value", [1e-9, 0.1, -3.0, 50.0, 1000.0, -1000.0])
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_common_shift_does_nothing(runner: str, value: float) -> None:
    delta, p = torch.full((2, 3, 65), value), inputs((2, 3, 65), 1.0)[1]
    with running(runner):
        got = dzkernels.softmax_difference(delta, p)
        log = dzkernels.softmax_difference(delta, p, log=True)
    assert_bounded(got, torch.zeros(2, 3, 65), bound(delta, p, False))
    assert_bounded(log, torch.zeros(2, 3, 65), bound(delta, p, True))


@pytest.mark.parametrize("runner", RUNNERS)
def test_huge_changes(runner: str) -> None:
    """Past the range of exp: all the probability goes to one class, and log-softmax moves by what the logits move."""
    p = torch.full((1, 4), 0.25)
    delta = torch.tensor([[[0, 1e30, 0, 0]], [[-1e30, 0, 0, 0]], [[-1e30] * 3 + [0]], [[61.0, 0, 0, 0]]])
    with running(runner):
        got = dzkernels.softmax_difference(delta, p)[:, 0]
        log = dzkernels.softmax_difference(delta, p, log=True)[:, 0]
    third = 1 / 3 - 0.25
    wanted = [[-0.25, 0.75, -0.25, -0.25], [-0.25, third, third, third], [-0.25] * 3 + [0.75], [0.75] + [-0.25] * 3]
    assert_bounded(got, torch.tensor(wanted), 4 * U)
    assert_bounded(log[0, :2], torch.tensor([-1e30, math.log(4)]), torch.tensor([1e24, 4 * U]))
    assert_bounded(log[1, 1], torch.tensor(math.log(4 / 3)), 4 * U)
    assert_bounded(log[3, :2], torch.tensor([math.log(4), math.log(4) - 61]), 16 * U * 61)


@pytest.mark.parametrize("log_p", [-40.0, -87.0, -100.0])
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_class_that_had_no_chance(runner: str, log_p: float) -> None:
    p = torch.tensor([[math.exp(log_p), 1.0]])
    for move in (20.0, 39.0, 60.0, 88.0, 120.0):
        delta = torch.tensor([[[move, 0.0]], [[0.0, -move]]])
        wanted = dzkernels.softmax_difference(delta.double(), p.double())
        with running(runner):
            got = dzkernels.softmax_difference(delta, p)
        assert_bounded(got, wanted, bound(delta, p, False) + 2.0**-148)


@pytest.mark.parametrize("garbage", [0.0, 5.0, 1e30, -1e30, 90.0])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 100.0])
@pytest.mark.parametrize("runner", RUNNERS)
def test_masked_entries(runner: str, scale: float, garbage: float) -> None:
    """What has no probability gives exactly 0 and has no say in the rest."""
    delta, p = inputs((3, 4, 37), scale)
    p[:, 20:] = 0
    p = p / p.sum(1, keepdim=True)
    p[1] = 0
    p[1, 5] = 1
    delta[:, :, 20:] = garbage
    with running(runner):
        got = dzkernels.softmax_difference(delta, p)
        log = dzkernels.softmax_difference(delta, p, log=True)
        calm = delta.masked_fill(p == 0, 0.0)
        assert_exact(got, dzkernels.softmax_difference(calm, p))
        possible = (p > 0).expand_as(delta)
        assert_exact(log[possible], dzkernels.softmax_difference(calm, p, log=True)[possible])
    assert_exact(got[:, :, 20:], torch.zeros(3, 4, 17))
    assert_exact(got[:, 1], torch.zeros(3, 37))
    assert_bounded(log[:, 1], delta[:, 1].double() - delta[:, 1, 5:6].double(), 4 * U * (abs(garbage) + 6 * scale))


@pytest.mark.parametrize("runner", RUNNERS)
def test_nan_stays_in_its_row(runner: str) -> None:
    delta, p = inputs((2, 3, 20), 1.0)
    delta[1, 2, 7] = math.nan
    for log in (False, True):
        with running(runner):
            got = dzkernels.softmax_difference(delta, p, log=log)
        assert got[1, 2].isnan().all()
        assert int(got.isnan().sum()) == 20
    p[0, 3] = math.nan
    with running(runner):
        assert dzkernels.softmax_difference(delta, p)[:, 0].isnan().all()


@pytest.mark.parametrize("runner", RUNNERS)
def test_odd_memory_and_empty(runner: str) -> None:
    delta, p = inputs((3, 4, 35), 1.0)
    for log in (False, True):
        with running(runner):
            wanted = dzkernels.softmax_difference(delta, p, log=log)
            assert_exact(dzkernels.softmax_difference(strided(delta), strided(p), log=log), wanted)
            turned = delta.transpose(0, 2).contiguous().transpose(0, 2)
            assert_exact(dzkernels.softmax_difference(turned, p, log=log), wanted)
            assert dzkernels.softmax_difference(delta[:0], p, log=log).shape == (0, 4, 35)
            assert dzkernels.softmax_difference(delta[:, :0], p[:0], log=log).shape == (3, 0, 35)


@pytest.mark.parametrize("shape", [(3, 7, 65), (1, 1000, 10), (2, 1, 9001)])
def test_threads_and_neighbours_do_not_matter(shape: tuple[int, int, int]) -> None:
    delta, p = inputs(shape, 1.0)
    for log in (False, True):
        torch.set_num_threads(1)
        wanted = dzkernels.softmax_difference(delta, p, log=log)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_exact(dzkernels.softmax_difference(delta, p, log=log), wanted)
        assert_exact(dzkernels.softmax_difference(delta[:, -1:], p[-1:], log=log), wanted[:, -1:])


GOOD: dict[str, Any] = dict(zip(("delta", "p"), inputs((3, 2, 4), 1.0), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": 1.0}, TypeError, r"dz::softmax_difference: delta must be a tensor, got float"),
        ({"delta": GOOD["delta"].long()}, TypeError, r"delta must be of a floating-point dtype, got int64"),
        ({"delta": GOOD["delta"][0]}, ValueError, r"delta must be of shape \[P, R, K\], got \[2, 4\]"),
        ({"delta": torch.zeros(3, 2, 0)}, ValueError, r"delta must be non-empty in K, got \[3, 2, 0\]"),
        ({"p": GOOD["p"].double()}, TypeError, r"p must be float32, got float64"),
        ({"p": GOOD["p"][:1]}, ValueError, r"p must be of shape \[R, K\] = \[2, 4\], got \[1, 4\]"),
        ({"p": GOOD["p"].to("meta")}, ValueError, r"p must be on cpu like delta, got meta"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.softmax_difference(**{**GOOD, **change})
