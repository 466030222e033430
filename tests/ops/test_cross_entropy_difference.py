"""cross_entropy_difference is the change of the mean cross-entropy when the logits move."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dzkernels
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, integers, normal, running, small_ints, strided
from ops.cases.cross_entropy_difference import exact, inputs

U64 = UNIT[torch.float64]


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", [(3, 5, 10), (2, 1, 2), (1, 3, 37), (2, 7, 1)])
def test_against_many_digits(shape: tuple[int, int, int], runner: str, scale: float) -> None:
    """Off by some 32 roundings of the mean of sum_k p_k |e_k|, and of the change itself where that is large."""
    log_probs, target, dlogits = inputs(*shape, scale)
    wanted = exact(log_probs, target, dlogits)
    e = dlogits.double() - dlogits.double().gather(2, target.expand(shape[0], -1).unsqueeze(2))
    size = (log_probs.exp() * e.abs()).sum(2).mean(1) + (e.abs().amax(2) if scale >= 1 else 0 * e.sum(2)).mean(1)
    with running(runner):
        got = dzkernels.cross_entropy_difference(log_probs, target, dlogits)
    assert got.dtype == torch.float64
    assert_bounded(got, wanted, 32 * U64 * size)


@pytest.mark.parametrize("runner", RUNNERS)
def test_is_a_float64_rerun(runner: str) -> None:
    logits, target, dlogits = (
        normal(64, 10, seed=1, dtype=torch.float64),
        integers([64], 10, seed=2),
        normal(9, 64, 10, seed=3),
    )
    wanted = torch.stack(
        [F.cross_entropy(logits + d, target) - F.cross_entropy(logits, target) for d in dlogits.double()]
    )
    with running(runner):
        got = dzkernels.cross_entropy_difference(logits.log_softmax(1), target, dlogits)
    assert_bounded(got, wanted, 1e-14)


@pytest.mark.parametrize("runner", RUNNERS)
def test_huge_changes(runner: str) -> None:
    """Past the range of exp: the loss moves by what the logits move."""
    log_probs = torch.full((1, 3), 1 / 3, dtype=torch.float64).log()
    target = torch.tensor([0])
    dlogits = torch.tensor([[[0.0, 1e30, 0.0]], [[1e30, 0.0, 0.0]], [[-1e30, -1e30, -1e30]], [[-2000.0, 0.0, 0.0]]])
    with running(runner):
        got = dzkernels.cross_entropy_difference(log_probs, target, dlogits)
    third = math.log(3)
    big = float(torch.tensor(1e30))
    wanted = torch.tensor([big - third, -third, 0.0, 2000 + math.log(2) - third], dtype=torch.float64)
    assert_bounded(got, wanted, 8 * U64 * (wanted.abs() + 1))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("log_prob", [-40.0, -700.0])
def test_a_target_that_had_no_chance(runner: str, log_prob: float) -> None:
    """The sum of p expm1(e) is almost -1 there; log1p of it would have no digits."""
    log_probs = torch.tensor([[log_prob, 0.0]], dtype=torch.float64)
    dlogits = torch.tensor([[[60.0, 0.0]], [[800.0, 0.0]]])
    with running(runner):
        got = dzkernels.cross_entropy_difference(log_probs, torch.tensor([0]), dlogits)
    wanted = torch.tensor([math.log(math.exp(log_prob) + math.exp(-60.0)), 0.0], dtype=torch.float64)
    wanted[1] = max(log_prob, -800.0)
    assert_bounded(got, wanted, 8 * U64 * wanted.abs())


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_common_shift_does_nothing(runner: str) -> None:
    log_probs, target, _ = inputs(1, 6, 10, 1.0)
    shift = small_ints(4, 6, 1, seed=1).expand(4, 6, 10)
    with running(runner):
        assert_exact(dzkernels.cross_entropy_difference(log_probs, target, shift), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("runner", RUNNERS)
def test_impossible_classes_and_nan(runner: str) -> None:
    log_probs = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    dlogits = torch.tensor([[[0.0, 5.0]], [[math.nan, 0.0]], [[0.0, math.nan]]])
    with running(runner):
        got = dzkernels.cross_entropy_difference(log_probs, torch.tensor([0]), dlogits)
    assert got[0] == 0
    assert got[1:].isnan().all()


@pytest.mark.parametrize("runner", RUNNERS)
def test_odd_memory_float32_and_no_perturbation(runner: str) -> None:
    log_probs, target, dlogits = inputs(3, 5, 10, 1.0)
    with running(runner):
        wanted = dzkernels.cross_entropy_difference(log_probs, target, dlogits)
        got = dzkernels.cross_entropy_difference(strided(log_probs), strided(target), strided(dlogits))
        assert_exact(got, wanted)
        narrow = dzkernels.cross_entropy_difference(log_probs.float(), target, dlogits)
        assert_exact(narrow, dzkernels.cross_entropy_difference(log_probs.float().double(), target, dlogits))
        assert dzkernels.cross_entropy_difference(log_probs, target, dlogits[:0]).shape == (0,)


def test_threads_do_not_matter() -> None:
    log_probs, target, dlogits = inputs(7, 300, 10, 1.0)
    wanted = dzkernels.cross_entropy_difference(log_probs, target, dlogits)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_exact(dzkernels.cross_entropy_difference(log_probs, target, dlogits), wanted)


GOOD = dict(zip(("log_probs", "target", "dlogits"), inputs(3, 2, 4, 1.0), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_probs": 0}, TypeError, r"dz::cross_entropy_difference: log_probs must be a tensor, got int"),
        ({"log_probs": GOOD["log_probs"].half()}, TypeError, r"log_probs must be float64 or float32, got float16"),
        ({"log_probs": GOOD["log_probs"][0]}, ValueError, r"log_probs must be of shape \[N, K\], got \[4\]"),
        ({"log_probs": torch.zeros(0, 4)}, ValueError, r"log_probs must be non-empty in N and K, got \[0, 4\]"),
        ({"target": GOOD["target"].int()}, TypeError, r"target must be int64, got int32"),
        (
            {"target": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"target must be of shape \[N\] = \[2\], got \[3\]",
        ),
        ({"target": torch.tensor([0, 4])}, ValueError, r"target must be in 0..3 \(classes\), got 4"),
        ({"dlogits": GOOD["dlogits"].long()}, TypeError, r"dlogits must be of a floating-point dtype, got int64"),
        (
            {"dlogits": GOOD["dlogits"][0]},
            ValueError,
            r"dlogits must be of shape \[P, N, K\] = \[\*, 2, 4\], got \[2, 4\]",
        ),
        ({"dlogits": GOOD["dlogits"].to("meta")}, ValueError, r"log_probs must be on meta like dlogits, got cpu"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.cross_entropy_difference(**{**GOOD, **change})
