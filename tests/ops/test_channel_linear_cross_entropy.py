"""channel_linear_cross_entropy is cross_entropy_difference of the logits' change that one feature makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dzkernels
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, integers, normal, running, small_ints, strided
from ops.cases.channel_linear_cross_entropy import inputs

U64 = UNIT[torch.float64]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(5, 16, 10, 7), (1, 1, 2, 1), (3, 9, 33, 4), (2, 7, 1, 3)])
def test_is_the_loss_of_the_stored_logits(shape: tuple[int, int, int, int], scale: float, runner: str) -> None:
    """Off by some 32 roundings of the mean of sum_k p_k |e_k|, and of the change itself where that is large."""
    args = inputs(*shape, scale)
    dlogits = args["delta"].double().unsqueeze(2) * args["weight"].double().t()[args["channel"]].unsqueeze(1)
    with dzkernels.use_backend("reference"):
        wanted = dzkernels.cross_entropy_difference(args["log_probs"], args["target"], dlogits)
    e = dlogits - dlogits.gather(2, args["target"].expand(shape[0], -1).unsqueeze(2))
    size = (args["log_probs"].exp() * e.abs()).sum(2).mean(1) + (e.abs().amax(2) if scale >= 1 else 0 * e.sum(2)).mean(
        1
    )
    # The reference subtracts rounded products: that error is of the size of the products, not of e.
    products = dlogits.abs().amax(2).mean(1)
    with running(runner):
        got = dzkernels.channel_linear_cross_entropy(**args)
    assert got.dtype == torch.float64
    assert_bounded(got, wanted, 64 * U64 * size + 4 * U64 * products)


@pytest.mark.parametrize("runner", RUNNERS)
def test_is_a_float64_rerun(runner: str) -> None:
    logits, target = normal(33, 10, seed=1, dtype=torch.float64), integers([33], 10, seed=2)
    delta, channel, weight = normal(6, 33, seed=3), integers([6], 4, seed=4), normal(10, 4, seed=5)
    dlogits = delta.double().unsqueeze(2) * weight.double().t()[channel].unsqueeze(1)
    wanted = torch.stack([F.cross_entropy(logits + d, target) - F.cross_entropy(logits, target) for d in dlogits])
    with running(runner):
        got = dzkernels.channel_linear_cross_entropy(delta, channel, weight, logits.log_softmax(1), target)
    assert_bounded(got, wanted, 1e-14)


@pytest.mark.parametrize("runner", RUNNERS)
def test_equal_weights_change_nothing(runner: str) -> None:
    args = inputs(4, 11, 5, 3, 1.0)
    args["weight"] = small_ints(1, 3, seed=1).expand(5, 3)
    with running(runner):
        assert_exact(dzkernels.channel_linear_cross_entropy(**args), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("runner", RUNNERS)
def test_huge_changes_and_nan(runner: str) -> None:
    log_probs = torch.full((2, 2), 0.5, dtype=torch.float64).log()
    delta = torch.tensor([[1e30, 0.0], [-1e30, 0.0], [float("nan"), 0.0]])
    with running(runner):
        got = dzkernels.channel_linear_cross_entropy(
            delta, torch.zeros(3, dtype=torch.int64), torch.tensor([[0.0], [1.0]]), log_probs, torch.tensor([0, 0])
        )
    half = torch.tensor(2.0, dtype=torch.float64).log()
    wanted = torch.stack([(delta[0, 0].double() - half) / 2, -half / 2])
    assert_bounded(got[:2], wanted, 8 * U64 * (wanted.abs() + 1))
    assert got[2].isnan()


@pytest.mark.parametrize("runner", RUNNERS)
def test_odd_memory_float32_and_no_perturbation(runner: str) -> None:
    args = inputs(3, 5, 10, 4, 0.1)
    with running(runner):
        wanted = dzkernels.channel_linear_cross_entropy(**args)
        assert_exact(dzkernels.channel_linear_cross_entropy(**{k: strided(v) for k, v in args.items()}), wanted)
        narrow = {**args, "log_probs": args["log_probs"].float()}
        wide = {**args, "log_probs": args["log_probs"].float().double()}
        assert_exact(dzkernels.channel_linear_cross_entropy(**narrow), dzkernels.channel_linear_cross_entropy(**wide))
        none = {**args, "delta": args["delta"][:0], "channel": args["channel"][:0]}
        assert dzkernels.channel_linear_cross_entropy(**none).shape == (0,)


def test_threads_do_not_matter() -> None:
    args = inputs(7, 300, 10, 4, 0.1)
    wanted = dzkernels.channel_linear_cross_entropy(**args)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_exact(dzkernels.channel_linear_cross_entropy(**args), wanted)


GOOD = inputs(3, 2, 4, 5, 1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": 0}, TypeError, r"dz::channel_linear_cross_entropy: delta must be a tensor, got int"),
        ({"delta": GOOD["delta"][0]}, ValueError, r"delta must be of shape \[P, N\], got \[2\]"),
        ({"channel": GOOD["channel"].int()}, TypeError, r"channel must be int64, got int32"),
        ({"channel": GOOD["channel"][:2]}, ValueError, r"channel must be of shape \[P\] = \[3\], got \[2\]"),
        ({"channel": torch.tensor([0, 5, 0])}, ValueError, r"channel must be in 0..4 \(columns of weight\), got 5"),
        ({"weight": GOOD["weight"].double()}, TypeError, r"weight must be float32, got float64"),
        ({"weight": GOOD["weight"][0]}, ValueError, r"weight must be of shape \[K, C\], got \[5\]"),
        ({"log_probs": GOOD["log_probs"].half()}, TypeError, r"log_probs must be float64 or float32, got float16"),
        (
            {"log_probs": GOOD["log_probs"][:1]},
            ValueError,
            r"log_probs must be of shape \[N, K\] = \[2, 4\], got \[1, 4\]",
        ),
        (
            {"delta": torch.zeros(3, 0), "log_probs": torch.zeros(0, 4), "target": GOOD["target"][:0]},
            ValueError,
            r"log_probs must be non-empty in N and K, got \[0, 4\]",
        ),
        ({"target": GOOD["target"].int()}, TypeError, r"target must be int64, got int32"),
        ({"target": GOOD["target"][:1]}, ValueError, r"target must be of shape \[N\] = \[2\], got \[1\]"),
        ({"target": torch.tensor([0, 4])}, ValueError, r"target must be in 0..3 \(classes\), got 4"),
        ({"weight": GOOD["weight"].to("meta")}, ValueError, r"weight must be on cpu like delta, got meta"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.channel_linear_cross_entropy(**{**GOOD, **change})
