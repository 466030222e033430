"""channel_conv2d_batch_norm is channel_conv2d with the norm, activation, pooling and mean after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dzkernels
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, pooled, running, small_ints, strided
from ops.after import norm_of
from ops.cases.channel_conv2d_batch_norm import SHAPES, by_rerun, inputs

# A window comes after an activation.
WINDOWS = [
    pytest.param(*row.values, relu, id=f"{row.id}-{relu}")
    for row in pooled(SHAPES, lambda shape: inputs(shape)["zc"].shape[2:])
    for relu in (False, True)
    if relu or row.values[1] == 1
]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("shape", "pool", "relu"), WINDOWS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mean", [False, True])
def test_is_a_float64_rerun(
    shape: tuple[Any, ...], mean: bool, pool: int, relu: bool, training: bool, runner: str
) -> None:
    args = inputs(shape)
    wanted, bound = by_rerun(args, training, relu, pool, mean)
    with running(runner):
        got = dzkernels.channel_conv2d_batch_norm(**args, training=training, relu=relu, pool=pool, mean=mean)
    assert got.movedim(2, -1).is_contiguous()
    assert_bounded(got, wanted, bound)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("width", [4, 5, 8, 16, 21])
def test_small_integers_bit_for_bit(pool: int, width: int, runner: str) -> None:
    """With running statistics and gamma / s = 2 nothing is rounded, in bfloat16 once."""
    delta, weight = small_ints(3, 2, 6, width, seed=1), small_ints(20, 2, 3, 3, seed=2)
    channel, zc, beta = torch.tensor([0, 1, 1]), small_ints(2, 20, 6, width, seed=3), small_ints(20, seed=4)
    y = 2 * zc + beta[:, None, None]
    moved = 2 * dzkernels.channel_conv2d(delta, channel, weight, padding=1)
    after, before = (y + moved).clamp_min(0), y.clamp_min(0)
    wanted = F.max_pool2d(after.flatten(0, 1), pool).unflatten(0, (3, 2)) - F.max_pool2d(before, pool)
    args = {"eps": 0.0, "training": False, "relu": True, "pool": pool, "padding": 1, "beta": beta}
    var = torch.full((20,), 0.25, dtype=torch.float64)
    with running(runner):
        for dtype in (torch.float32, torch.bfloat16):
            got = dzkernels.channel_conv2d_batch_norm(delta, channel, weight, zc, var, **args, out_dtype=dtype)
            assert_exact(got, wanted.to(dtype))


@pytest.mark.parametrize("runner", RUNNERS)
def test_odd_memory(runner: str) -> None:
    args = inputs(SHAPES[0].values[0])
    with running(runner):
        wanted = dzkernels.channel_conv2d_batch_norm(**args, relu=True, pool=2)
        for layout in (strided, lambda t: t.contiguous()):
            moved = {name: layout(v) if isinstance(v, Tensor) else v for name, v in args.items()}
            assert_exact(dzkernels.channel_conv2d_batch_norm(**moved, relu=True, pool=2), wanted)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("left", [2.0**-6, 2.0**-12])
def test_a_vanishing_variance(runner: str, left: float) -> None:
    """The difference all but cancels the input of the norm: var + dvar cancels, the new variance must not."""
    zc = norm_of(3, 1, 8, 8)["zc"]
    var = zc.double().var((0, 2, 3), correction=0)
    delta, one = (zc[:, 0] * (left - 1))[None], torch.ones(1, 1, 1, 1)
    before, after = ((var * k * k + 1e-5).sqrt() for k in (1.0, left))
    z = zc.double()[None]
    with running(runner):
        got = dzkernels.channel_conv2d_batch_norm(delta, torch.tensor([0]), one, zc, var, eps=1e-5)
    # roundings of d / s' and z dvar / (s s' (s + s')), each at most |z| / s', and of the sum that gives d's mean
    bound = UNIT[torch.float32] * (16 * z.abs() + 140 * z.abs().mean()) / after
    assert_bounded(got, z * left / after - z / before, bound + 2 * z.mean().abs() / after)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_a_large_mean_costs_no_digits(runner: str, mean: float) -> None:
    args = inputs((3, 16, 16, 18, 2, (3, 3), (1, 1), (0, 0), (1, 1)))
    args["delta"] = args["delta"] + mean
    wanted, bound = by_rerun(args, True, True, 2, False)
    with running(runner):
        assert_bounded(dzkernels.channel_conv2d_batch_norm(**args, relu=True, pool=2), wanted, bound)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_nan_does_not_hide(runner: str, pool: int, training: bool) -> None:
    args = inputs((2, 8, 8, 18, 2, (1, 1), (1, 1), (0, 0), (1, 1)))
    args["delta"][1, 0, 3, 3] = float("nan")
    with running(runner):
        hidden = dzkernels.channel_conv2d_batch_norm(**args, relu=True, pool=pool, training=training).isnan()
    assert hidden[1].all() if training else int(hidden[1].sum()) == 18
    assert not hidden[[0, 2, 3]].any()


@pytest.mark.parametrize("runner", RUNNERS)
def test_no_perturbation_and_no_affine(runner: str) -> None:
    args = inputs(SHAPES[1].values[0])
    with running(runner):
        none = {"delta": args["delta"][:0], "channel": args["channel"][:0]}
        assert dzkernels.channel_conv2d_batch_norm(**{**args, **none}, relu=True, pool=2).shape == (0, 5, 18, 4, 4)
        assert dzkernels.channel_conv2d_batch_norm(**{**args, **none}, mean=True).shape == (0, 5, 18)
        unit = {"gamma": torch.ones(18), "beta": torch.zeros(18)}
        plain = dzkernels.channel_conv2d_batch_norm(**{**args, **unit}, relu=True)
        assert_exact(dzkernels.channel_conv2d_batch_norm(**{**args, "gamma": None, "beta": None}, relu=True), plain)


@pytest.mark.parametrize("runner", [runner for runner in RUNNERS if runner != "reference"])
@pytest.mark.parametrize("mean", [False, True])
def test_threads_do_not_matter(runner: str, mean: bool) -> None:
    args = inputs(SHAPES[3].values[0])
    with running(runner):
        wanted = dzkernels.channel_conv2d_batch_norm(**args, relu=True, pool=2, mean=mean)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_exact(dzkernels.channel_conv2d_batch_norm(**args, relu=True, pool=2, mean=mean), wanted)


GOOD = inputs(SHAPES[1].values[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": 1.0}, TypeError, r"dz::channel_conv2d_batch_norm: delta must be a tensor, got float"),
        ({"channel": torch.tensor([0, 1, 2, 0])}, ValueError, r"channel must be in 0..1 \(input channels\), got 2"),
        ({"weight": GOOD["weight"].double()}, TypeError, r"weight must be float32, got float64"),
        ({"zc": GOOD["zc"][:, :17]}, ValueError, r"zc must be of shape \[N, O, Ho, Wo\] = \[5, 18, \*, \*\], got \[5,"),
        ({"zc": GOOD["zc"].double()}, TypeError, r"zc must be float32, got float64"),
        ({"var": GOOD["var"].float()}, TypeError, r"var must be float64, got float32"),
        ({"gamma": GOOD["gamma"][:2]}, ValueError, r"gamma must be of shape \[O\] = \[18\], got \[2\]"),
        ({"beta": GOOD["beta"].half()}, TypeError, r"beta must be float32 or float64, got float16"),
        ({"pool": 2}, ValueError, r"relu must be True with pool=2, got False"),
        ({"eps": -1.0}, ValueError, r"eps must be at least 0, got -1.0"),
        ({"out_dtype": torch.int64}, TypeError, r"out_dtype must be a floating-point dtype, got torch.int64"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.channel_conv2d_batch_norm(**{**GOOD, **change})
