"""channel_batch_norm is the change of batch norm (and ReLU) when one channel of its input changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, integers, normal, running, strided
from torch import Tensor

import dzkernels

EPS = 1e-5
# P, N, C, H, W
SHAPES = [
    pytest.param((6, 4, 3, 8, 8), id="plain"),
    pytest.param((2, 1, 1, 5, 7), id="one image, one channel"),
    pytest.param((3, 9, 4, 1, 1), id="one pixel"),
    pytest.param((9, 7, 5, 3, 11), id="odd"),
    pytest.param((2, 9, 2, 24, 24), id="several blocks"),
]


def inputs(shape: tuple[int, ...], scale: float = 1.0) -> dict[str, Any]:
    perturbations, samples, channels, height, width = shape
    x = normal(samples, channels, height, width, seed=1) * 2 + 3
    wide = x.double()
    mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
    gamma, beta = normal(channels, seed=2), normal(channels, seed=3)
    y = F.batch_norm(wide, mean, var, gamma.double(), beta.double(), False, 0.0, EPS).float()
    return {
        "delta": normal(perturbations, samples, height, width, seed=4) * scale + 0.3 * scale,
        "channel": integers([perturbations], channels, seed=5),
        "x": x,
        "mean": mean,
        "var": var,
        "gamma": gamma,
        "y": y,
        "eps": EPS,
    }


def by_rerun(args: dict[str, Any], relu: bool) -> tuple[Tensor, Tensor]:
    """The change by running batch norm twice in float64, and the magnitude that its terms have."""
    channel, gamma = args["channel"], args["gamma"].double()
    z = args["x"].double().transpose(0, 1)[channel]  # [P, N, H, W]

    def norm(v: Tensor) -> Tensor:
        centred = v - v.mean((1, 2, 3), keepdim=True)
        deviation = (centred.square().mean((1, 2, 3), keepdim=True) + EPS).sqrt()
        return gamma[channel][:, None, None, None] * centred / deviation

    before, after = norm(z), norm(z + args["delta"].double())
    change = after - before
    if relu:
        y = args["y"].double().transpose(0, 1)[channel]
        change = (y + change).clamp_min(0) - y.clamp_min(0)
    deviation = (args["var"][channel] + EPS).sqrt()[:, None, None, None]
    delta = args["delta"].double()
    spread = (delta - delta.mean((1, 2, 3), keepdim=True)).abs()
    # |d| / s' + |z dvar| / (s s' (s + s')), from |dvar| <= mean(2 |z d| + d^2), with s' from the rerun
    zc = (z - args["mean"][channel][:, None, None, None]).abs()
    moved = z + delta
    new = (moved.var((1, 2, 3), correction=0, keepdim=True) + EPS).sqrt()
    dvar = (2 * zc * spread + spread.square()).mean((1, 2, 3), keepdim=True)
    size = gamma[channel].abs()[:, None, None, None] * (
        spread / new + zc * dvar / (deviation * new * (deviation + new))
    )
    return change, size


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_is_a_float64_rerun(shape: tuple[int, ...], runner: str, relu: bool, scale: float) -> None:
    """Rounding z, the products and the result: 8 roundings of the terms. The rerun itself loses 2^-53 / scale."""
    args = inputs(shape, scale)
    wanted, size = by_rerun(args, relu)
    with running(runner):
        got = dzkernels.channel_batch_norm(**args, relu=relu)
    assert got.is_contiguous()
    # With ReLU a dead unit that comes alive keeps the rounding of y itself out: y is an input here.
    assert_bounded(got, wanted, 8 * UNIT[torch.float32] * size + 64 * UNIT[torch.float64] * (1 + size))


@pytest.mark.parametrize("runner", RUNNERS)
def test_small_changes_keep_their_digits(runner: str) -> None:
    """At a step of 1e-8 a rerun has no digits left; the difference has all of float32. Linear in the step there."""
    args = inputs((4, 4, 3, 8, 8))
    with running(runner):
        small = dzkernels.channel_batch_norm(**{**args, "delta": args["delta"] * 2.0**-30})
        smaller = dzkernels.channel_batch_norm(**{**args, "delta": args["delta"] * 2.0**-31})
    _, size = by_rerun({**args, "delta": args["delta"] * 2.0**-30}, False)
    assert_bounded(small, 2 * smaller.double(), 16 * UNIT[torch.float32] * size + 2.0**-29 * size)


@pytest.mark.parametrize("runner", RUNNERS)
def test_backends_agree_on_odd_memory(runner: str) -> None:
    args = inputs((5, 3, 4, 6, 5), 0.1)
    with running(runner):
        wanted = dzkernels.channel_batch_norm(**args, relu=True)
        for layout in (strided, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t):
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
    assert_bounded(got, wanted, 8 * UNIT[torch.float32] * gamma * (zc / new + 1 / left))


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
def test_threads_do_not_matter(shape: tuple[int, ...]) -> None:
    """Fewer perturbations than threads are split by blocks, more are dealt whole: the same bits."""
    args = inputs(shape)
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
