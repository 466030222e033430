"""conv2d_tap_batch_norm is conv2d_tap with the norm, activation and pooling after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dzkernels
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, pooled, running, small_ints, strided
from ops.after import norm_of
from ops.cases.conv2d_tap_batch_norm import SHAPES, by_rerun, inputs

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
def test_is_a_float64_rerun(shape: tuple[Any, ...], pool: int, relu: bool, training: bool, runner: str) -> None:
    args = inputs(shape)
    wanted, bound = by_rerun(args, training, relu, pool)
    with running(runner):
        got = dzkernels.conv2d_tap_batch_norm(**args, training=training, relu=relu, pool=pool)
    assert got.is_contiguous()
    assert_bounded(got, wanted, bound)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("width", [4, 5, 8, 16, 21])
def test_small_integers_bit_for_bit(pool: int, width: int, runner: str) -> None:
    """With running statistics and gamma / s = 2 nothing is rounded."""
    x, zc = small_ints(2, 2, 6, width, seed=1), small_ints(2, 3, 6, width, seed=2)
    coord, step = torch.tensor([[0, 0, 1, 1], [2, 1, 0, 2], [2, 0, 2, 0]]), torch.tensor([1.0, -2.0, 0.5])
    beta = small_ints(3, seed=3)
    y = 2 * zc + beta[:, None, None]
    moved = torch.zeros(3, 2, 3, 6, width)
    d = dzkernels.conv2d_tap(x, coord, step, kernel=3, padding=1, out_channels=3)
    moved[torch.arange(3), :, coord[:, 0]] = 2 * d
    after, before = (y + moved).clamp_min(0), y.clamp_min(0)
    wanted = F.max_pool2d(after.flatten(0, 1), pool).unflatten(0, (3, 2)) - F.max_pool2d(before, pool)
    var = torch.full((3,), 0.25, dtype=torch.float64)
    with running(runner):
        got = dzkernels.conv2d_tap_batch_norm(
            x, coord, step, zc, var, None, beta, kernel=3, padding=1, eps=0.0, training=False, relu=True, pool=pool
        )
    assert_exact(got, wanted[torch.arange(3), :, coord[:, 0]].contiguous())


@pytest.mark.parametrize("runner", RUNNERS)
def test_odd_memory(runner: str) -> None:
    args = inputs(SHAPES[0].values[0])
    with running(runner):
        wanted = dzkernels.conv2d_tap_batch_norm(**args, relu=True, pool=2)
        for layout in (strided, lambda t: t.contiguous()):
            moved = {name: layout(v) if isinstance(v, Tensor) else v for name, v in args.items()}
            assert_exact(dzkernels.conv2d_tap_batch_norm(**moved, relu=True, pool=2), wanted)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("left", [2.0**-6, 2.0**-12])
def test_a_vanishing_variance(runner: str, left: float) -> None:
    """The weight of the only tap all but cancels the input: var + dvar cancels, the new variance must not."""
    zc = norm_of(3, 1, 8, 8)["zc"]
    args = {
        "x": zc, "coord": torch.zeros(1, 4, dtype=torch.int64), "step": torch.tensor([left - 1]), "kernel": 1,
        "zc": zc, "var": zc.double().var((0, 2, 3), correction=0), "eps": 1e-5,
    }  # fmt: skip
    before, after = ((args["var"] * k * k + 1e-5).sqrt() for k in (1.0, left))
    z = zc.double().transpose(0, 1)
    wanted = z * left / after - z / before
    with running(runner):
        got = dzkernels.conv2d_tap_batch_norm(**args)
    # roundings of d / s' and z dvar / (s s' (s + s')), each at most |z| / s', and of the sum that gives d's mean
    bound = UNIT[torch.float32] * (16 * z.abs() + 140 * z.abs().mean()) / after
    assert_bounded(got, wanted, bound + 2 * z.mean().abs() / after)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_nan_does_not_hide(runner: str, pool: int, training: bool) -> None:
    args = inputs(SHAPES[0].values[0], 3) | {
        "kernel": 1,
        "padding": 0,
        "coord": torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0]]),
    }
    args["step"] = args["step"][:2]
    args["x"][0, 1, 3, 3] = float("nan")
    with running(runner):
        hidden = dzkernels.conv2d_tap_batch_norm(**args, relu=True, pool=pool, training=training).isnan()
    assert hidden[0].all() if training else int(hidden[0].sum()) == 1
    assert not hidden[1].any()


@pytest.mark.parametrize("runner", RUNNERS)
def test_no_perturbation_and_no_affine(runner: str) -> None:
    args = inputs(SHAPES[1].values[0])
    with running(runner):
        none = {"coord": args["coord"][:0], "step": args["step"][:0]}
        assert dzkernels.conv2d_tap_batch_norm(**{**args, **none}, relu=True, pool=2).shape == (0, 5, 4, 4)
        plain = dzkernels.conv2d_tap_batch_norm(**{**args, "gamma": torch.ones(3), "beta": torch.zeros(3)}, relu=True)
        assert_exact(dzkernels.conv2d_tap_batch_norm(**{**args, "gamma": None, "beta": None}, relu=True), plain)


@pytest.mark.parametrize("runner", [runner for runner in RUNNERS if runner != "reference"])
def test_threads_do_not_matter(runner: str) -> None:
    args = inputs(SHAPES[3].values[0])
    with running(runner):
        wanted = dzkernels.conv2d_tap_batch_norm(**args, relu=True, pool=2)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_exact(dzkernels.conv2d_tap_batch_norm(**args, relu=True, pool=2), wanted)


GOOD = inputs(SHAPES[1].values[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 1.0}, TypeError, r"dz::conv2d_tap_batch_norm: x must be a tensor, got float"),
        ({"coord": torch.tensor([[3, 0, 0, 0]] * 5)}, ValueError, r"coord must be inside the weight \[3, 2, 3, 3\]"),
        ({"zc": GOOD["zc"].double()}, TypeError, r"zc must be float32, got float64"),
        ({"zc": 1.0}, TypeError, r"zc must be a tensor, got float"),
        ({"zc": GOOD["zc"][:, :, :7]}, ValueError, r"zc must be of shape \[N, O, Ho, Wo\] = \[5, 3, 8, 8\], got \[5,"),
        ({"zc": GOOD["zc"].to("meta")}, ValueError, r"zc must be on cpu like x, got meta"),
        ({"var": GOOD["var"].float()}, TypeError, r"var must be float64, got float32"),
        ({"var": GOOD["var"][:2]}, ValueError, r"var must be of shape \[O\] = \[3\], got \[2\]"),
        ({"gamma": GOOD["gamma"].half()}, TypeError, r"gamma must be float32 or float64, got float16"),
        ({"beta": GOOD["beta"][:2]}, ValueError, r"beta must be of shape \[O\] = \[3\], got \[2\]"),
        ({"pool": 2}, ValueError, r"relu must be True with pool=2, got False"),
        ({"pool": 9, "relu": True}, ValueError, r"pool must be an integer in 1..8 \(height and width\), got 9"),
        ({"eps": float("nan")}, ValueError, r"eps must be at least 0, got nan"),
        ({"groups": 2}, ValueError, r"out_channels must be a positive multiple of groups = 2, got 3"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.conv2d_tap_batch_norm(**{**GOOD, **change})
