"""channel_batch_norm is the change of batch norm (and ReLU) when one channel of its input changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dzkernels
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, integers, pooled, running, small_ints, strided
from ops.cases.channel_batch_norm import EPS, SHAPES, TERMS, by_rerun, inputs, largest


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("shape", "pool"), pooled(SHAPES, lambda shape: shape[3:]))
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_is_a_float64_rerun(
    shape: tuple[int, ...], runner: str, relu: bool, scale: float, pool: int, training: bool
) -> None:
    args = inputs(shape, scale, pool)
    wanted, bound = by_rerun(args, relu, training)
    with running(runner):
        got = dzkernels.channel_batch_norm(**args, relu=relu, training=training)
    assert got.is_contiguous()
    assert_bounded(got, wanted, bound)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("size", [(5, 7), (6, 4), (3, 33), (8, 8), (32, 32)])
def test_small_integers_bit_for_bit(runner: str, pool: int, size: tuple[int, int]) -> None:
    """With running statistics and gamma / s = 2 every sum and maximum is exact."""
    base, delta, channel = small_ints(2, 3, *size, seed=1), small_ints(4, 2, *size, seed=2), integers([4], 3, seed=3)
    before = base.clamp_min(0).transpose(0, 1)[channel]
    after = (base.transpose(0, 1)[channel] + 2 * delta).clamp_min(0)
    wanted = F.max_pool2d(after, pool) - F.max_pool2d(before, pool)
    args: dict[str, Any] = {"mean": torch.zeros(3).double(), "var": torch.full((3,), 0.25).double(), "eps": 0.0}
    gap = base.clamp_min(0) - largest(base.clamp_min(0), pool)
    planar = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (base, gap)]
    with running(runner):
        for y, g in ((base, gap), planar):
            got = dzkernels.channel_batch_norm(
                delta, channel, y, **args, training=False, y=y, relu=True, pool=pool, gap=g
            )
            assert_exact(got, wanted)


@pytest.mark.parametrize("runner", RUNNERS)
def test_small_changes_keep_their_digits(runner: str) -> None:
    """At a step of 1e-8 a rerun has no digits left; the difference has all of float32. Linear in the step there."""
    args = inputs((4, 4, 3, 8, 8))
    with running(runner):
        small = dzkernels.channel_batch_norm(**{**args, "delta": args["delta"] * 2.0**-30})
        smaller = dzkernels.channel_batch_norm(**{**args, "delta": args["delta"] * 2.0**-31})
    _, bound = by_rerun({**args, "delta": args["delta"] * 2.0**-30}, False)
    bound = bound - 2.0**-45
    assert_bounded(small, 2 * smaller.double(), 2 * bound + 2.0**-29 * bound / UNIT[torch.float32])


@pytest.mark.parametrize("runner", RUNNERS)
def test_backends_agree_on_odd_memory(runner: str) -> None:
    args = inputs((5, 3, 4, 6, 5), 0.1, 2)
    with running(runner):
        wanted = dzkernels.channel_batch_norm(**args, relu=True)
        for layout in (
            strided,
            lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
            lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 4 else t,
        ):
            moved = {name: layout(v) if isinstance(v, Tensor) else v for name, v in args.items()}
            assert_exact(dzkernels.channel_batch_norm(**moved, relu=True), wanted)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_constant_change_does_nothing(runner: str) -> None:
    args = inputs((3, 4, 2, 8, 8))
    with running(runner):
        got = dzkernels.channel_batch_norm(**{**args, "delta": torch.full((3, 4, 8, 8), 0.1)})
    assert_bounded(got, torch.zeros(3, 4, 8, 8), 1e-14)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("left", [0.25, 2.0**-6, 2.0**-12])
def test_a_vanishing_variance(runner: str, left: float) -> None:
    """delta = (left - 1) z leaves `left` of the spread: var + dvar cancels, the new variance must not."""
    args = inputs((2, 4, 2, 8, 8))
    z = args["x"].transpose(0, 1)[args["channel"]]
    args["delta"] = z * (left - 1)
    wanted, _ = by_rerun(args, False)
    # (left - 1) z is rounded to float32, as an input; against what is left of z that is u / left.
    with running(runner):
        got = dzkernels.channel_batch_norm(**args)
    gamma = args["gamma"].double()[args["channel"]].abs()[:, None, None, None]
    zc = (z.double() - z.double().mean((1, 2, 3), keepdim=True)).abs()
    new = ((z + args["delta"]).double().var((1, 2, 3), correction=0, keepdim=True) + EPS).sqrt()
    # Where nothing is retaken (1/4), the sums' TERMS roundings of at most 3 s^2 are magnified by s^2 / s'^2.
    before = (args["var"] + EPS)[args["channel"]].sqrt()[:, None, None, None]
    amplified = TERMS * 3 * (before / new).square() if left == 0.25 else 0.0
    mean = TERMS * 4 * before / new  # of delta, from its sums of |e| < 4 s
    assert_bounded(got, wanted, UNIT[torch.float32] * gamma * ((8 + amplified) * zc / new + 8 / left + mean))


@pytest.mark.parametrize("runner", RUNNERS)
def test_relu_by_cases_is_exact(runner: str) -> None:
    """A channel that batch norm leaves alone: mean 0, var + eps = 1, delta with mean 0 and dvar = 0."""
    z = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None, None]
    delta = torch.tensor([-2.0, 2.0, 0.0, 0.0])[None, :, None, None]  # swaps the first two
    y = torch.tensor([1.0, -1.5, 0.5, 0.0])[:, None, None, None]
    with running(runner):
        got = dzkernels.channel_batch_norm(
            delta, torch.tensor([0]), z, torch.zeros(1).double(), torch.ones(1).double(), eps=0.0, y=y, relu=True
        )
    assert_exact(got.flatten(), torch.tensor([-1.0, 0.5, 0.0, 0.0]))


@pytest.mark.parametrize("runner", RUNNERS)
def test_nan_does_not_hide_behind_the_relu(runner: str) -> None:
    args = inputs((2, 2, 2, 3, 3))
    args["delta"][1, 0, 0, 0] = float("nan")
    with running(runner):
        got = dzkernels.channel_batch_norm(**args, relu=True)
    assert got[1].isnan().all()
    assert not got[0].isnan().any()


@pytest.mark.parametrize("runner", RUNNERS)
def test_no_perturbation_and_no_gamma(runner: str) -> None:
    args = inputs((3, 2, 2, 3, 3))
    with running(runner):
        empty = {**args, "delta": torch.zeros(0, 2, 3, 3), "channel": torch.zeros(0, dtype=torch.int64)}
        assert dzkernels.channel_batch_norm(**empty).shape == (0, 2, 3, 3)
        ones = dzkernels.channel_batch_norm(**{**args, "gamma": torch.ones(2)})
        assert_exact(dzkernels.channel_batch_norm(**{**args, "gamma": None}), ones)


@pytest.mark.parametrize("shape", [(2, 9, 2, 24, 24), (5, 4, 3, 8, 8)])
@pytest.mark.parametrize("pool", [1, 2])
def test_threads_do_not_matter(shape: tuple[int, ...], pool: int) -> None:
    """Fewer perturbations than threads are split by blocks, more are dealt whole: the same bits."""
    args = inputs(shape, 1.0, pool)
    wanted = dzkernels.channel_batch_norm(**args, relu=True)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert_exact(dzkernels.channel_batch_norm(**args, relu=True), wanted)


GOOD = inputs((3, 2, 4, 5, 5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": 1.0}, TypeError, r"dz::channel_batch_norm: delta must be a tensor, got float"),
        ({"delta": torch.zeros(3, 2, 25)}, ValueError, r"delta must be of shape \[P, N, H, W\], got \[3, 2, 25\]"),
        ({"channel": GOOD["channel"].int()}, TypeError, r"channel must be int64, got int32"),
        ({"channel": GOOD["channel"][:2]}, ValueError, r"channel must be of shape \[P\] = \[3\], got \[2\]"),
        ({"channel": torch.tensor([0, 4, 0])}, ValueError, r"channel must be in 0..3 \(channels of x\), got 4"),
        ({"x": GOOD["x"].double()}, TypeError, r"x must be float32, got float64"),
        ({"x": GOOD["x"][:1]}, ValueError, r"x must be of shape \[N, C, H, W\] = \[2, \*, 5, 5\], got \[1, 4, 5, 5\]"),
        ({"x": GOOD["x"].to("meta")}, ValueError, r"x must be on cpu like delta, got meta"),
        ({"mean": GOOD["mean"].float()}, TypeError, r"mean must be float64, got float32"),
        ({"var": GOOD["var"][:3]}, ValueError, r"var must be of shape \[C\] = \[4\], got \[3\]"),
        ({"gamma": GOOD["gamma"].half()}, TypeError, r"gamma must be float32 or float64, got float16"),
        ({"gamma": GOOD["gamma"][:3]}, ValueError, r"gamma must be of shape \[C\] = \[4\], got \[3\]"),
        ({"relu": True, "y": None}, ValueError, r"y must be given with relu=True, got None"),
        ({"relu": True, "y": GOOD["y"].double()}, TypeError, r"y must be float32, got float64"),
        ({"relu": True, "y": GOOD["y"][:1]}, ValueError, r"y must be of shape \[N, C, H, W\] = \[2, 4, 5, 5\], got"),
        ({"pool": 2, "gap": None}, ValueError, r"gap must be given with pool=2, got None"),
        ({"pool": 2, "gap": GOOD["gap"].double()}, TypeError, r"gap must be float32, got float64"),
        ({"pool": 2, "gap": GOOD["gap"][:1]}, ValueError, r"gap must be of shape \[N, C, H, W\] = \[2, 4, 5, 5\], got"),
        ({"pool": 6}, ValueError, r"pool must be an integer in 1..5 \(height and width\), got 6"),
        ({"eps": -1.0}, ValueError, r"eps must be at least 0, got -1.0"),
        ({"eps": float("nan")}, ValueError, r"eps must be at least 0, got nan"),
        (
            {"delta": torch.zeros(3, 0, 5, 5), "x": torch.zeros(0, 4, 5, 5)},
            ValueError,
            r"delta must be non-empty in N, H and W, got \[3, 0, 5, 5\]",
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.channel_batch_norm(**{**GOOD, **change})
