"""dense_batch_norm is the change of batch norm, residual, ReLU and max pooling when all of the input changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dzkernels
from dzkernels._norm import moments
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, integers, normal, pooled, running, small_ints, strided
from ops.cases.dense_batch_norm import EPS, SHAPES, TERMS, by_rerun, inputs, largest, last


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [None, "dense", "bfloat16", "channel"])
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("shape", "pool"), pooled(SHAPES, lambda shape: shape[3:]))
def test_is_a_float64_rerun(
    shape: tuple[int, ...], runner: str, pool: int, residual: str | None, relu: bool, training: bool
) -> None:
    for scale in (1.0, 1e-3):
        args = inputs(shape, scale, pool)
        if residual == "channel":
            args["residual"] = normal(shape[0], shape[1], *shape[3:], seed=6) * scale
            args["residual_channel"] = integers([shape[0]], shape[2], seed=7)
        elif residual is not None:
            args["residual"] = last(normal(*shape, seed=6) * scale)
            if residual == "bfloat16":
                args["residual"] = args["residual"].bfloat16()
        wanted, bound = by_rerun(args, relu, training)
        with running(runner):
            got = dzkernels.dense_batch_norm(**args, relu=relu, training=training)
        assert got.movedim(2, -1).is_contiguous()
        assert got.dtype == torch.float32
        assert_bounded(got, wanted, bound)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_integers_bit_for_bit(runner: str, pool: int, residual: bool, dtype: torch.dtype) -> None:
    """With running statistics and gamma / s = 2 every sum and maximum is exact, in bfloat16 too."""
    for shape in ((3, 2, 18, 6, 5), (1, 1, 1, 5, 7), (2, 2, 33, 4, 4), (2, 3, 7, 5, 4)):
        base = small_ints(*shape[1:], seed=1)
        args: dict[str, Any] = {
            "delta": last(small_ints(*shape, seed=2)).to(dtype),
            "zc": last(base),
            "var": torch.full((shape[2],), 0.25, dtype=torch.float64),
            "eps": 0.0,
            "training": False,
            "relu": True,
            "y": last(base),
            "pool": pool,
            "gap": last(base.clamp_min(0) - largest(base.clamp_min(0), pool)),
            "out_dtype": dtype,
        }
        moved = 2 * args["delta"].float()
        if residual:
            args["residual"] = last(small_ints(*shape, seed=3)).to(dtype)
            moved = moved + args["residual"].float()
        after, before = (base + moved).clamp_min(0), base.clamp_min(0)
        wanted = F.max_pool2d(after.flatten(0, 1), pool).unflatten(0, shape[:2]) - F.max_pool2d(before, pool)
        with running(runner):
            assert_exact(dzkernels.dense_batch_norm(**args), wanted.to(dtype))


@pytest.mark.parametrize("runner", RUNNERS)
def test_bfloat16_in_and_out(runner: str) -> None:
    """The same values as float32 in, one more rounding out."""
    args = inputs((3, 4, 18, 8, 7), 0.1)
    args["delta"] = args["delta"].bfloat16()
    with running(runner):
        wide = dzkernels.dense_batch_norm(**{**args, "delta": args["delta"].float()}, relu=True)
        assert_exact(dzkernels.dense_batch_norm(**args, relu=True), wide)
        assert_exact(dzkernels.dense_batch_norm(**args, relu=True, out_dtype=torch.bfloat16), wide.bfloat16())


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_of_the_convolution_before(shape: tuple[int, ...], runner: str) -> None:
    args = inputs(shape, 0.1)
    wanted, bound = by_rerun(args, True, True)
    with running(runner):
        got = dzkernels.dense_batch_norm(**args, relu=True, moments=moments(args["delta"], args["zc"]))
    assert_bounded(got, wanted, bound)


def test_the_reference_takes_them_as_they_are() -> None:
    """In float64, so that nothing but the moments can differ: those of another difference give another result."""
    args = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs((2, 3, 4, 5, 5), 0.1).items()}
    with dzkernels.use_backend("reference"):
        wanted = dzkernels.dense_batch_norm(**args)
        own = moments(args["delta"], args["zc"])
        assert_exact(dzkernels.dense_batch_norm(**args, moments=own), wanted)
        for other in (own * torch.tensor([1.0, 1.1])[:, None], own * torch.tensor([1.1, 1.0])[:, None]):
            assert not torch.allclose(dzkernels.dense_batch_norm(**args, moments=other), wanted)


@pytest.mark.parametrize("runner", RUNNERS)
def test_other_dtypes(runner: str) -> None:
    args = inputs((2, 2, 3, 4, 4), 0.1)
    residual = last(normal(2, 2, 3, 4, 4, seed=5))
    with running(runner):
        wanted = dzkernels.dense_batch_norm(**args, residual=residual.half().float())
        assert_exact(dzkernels.dense_batch_norm(**args, residual=residual.half()), wanted)
        half = dzkernels.dense_batch_norm(**args, residual=residual.half(), out_dtype=torch.float16)
    assert_exact(half, wanted.half())


def test_float64_runs_in_float64() -> None:
    args = inputs((2, 3, 4, 5, 5), 1e-7)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in args.items()}
    got = dzkernels.dense_batch_norm(**wide)
    assert got.dtype == torch.float64
    assert_bounded(got, by_rerun(wide, False, True)[0], 1e-14)


@pytest.mark.parametrize("runner", RUNNERS)
def test_odd_memory(runner: str) -> None:
    args = inputs((3, 3, 5, 6, 5), 0.1, 2)
    args["residual"] = last(normal(3, 3, 5, 6, 5, seed=5))
    with running(runner):
        wanted = dzkernels.dense_batch_norm(**args, relu=True)
        for layout in (strided, lambda t: t.contiguous()):
            moved = {name: layout(v) if isinstance(v, Tensor) else v for name, v in args.items()}
            assert_exact(dzkernels.dense_batch_norm(**moved, relu=True), wanted)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_constant_change_does_nothing(runner: str) -> None:
    args = inputs((3, 4, 18, 8, 8))
    with running(runner):
        got = dzkernels.dense_batch_norm(**{**args, "delta": last(torch.full((3, 4, 18, 8, 8), 0.1))})
    assert_bounded(got, torch.zeros(3, 4, 18, 8, 8), 1e-14)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_a_large_mean_costs_no_digits(runner: str, mean: float) -> None:
    args = inputs((3, 4, 18, 8, 8), 0.1)
    args["delta"] = args["delta"] + mean
    wanted, bound = by_rerun(args, False, True)
    with running(runner):
        assert_bounded(dzkernels.dense_batch_norm(**args), wanted, bound)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("left", [0.25, 2.0**-6, 2.0**-12])
def test_a_vanishing_variance(runner: str, left: float) -> None:
    """delta = (left - 1) zc leaves `left` of the spread: var + dvar cancels, the new variance must not."""
    args = inputs((2, 4, 6, 8, 8))
    args["delta"] = last((args["zc"] * (left - 1)).expand(2, -1, -1, -1, -1))
    wanted, _ = by_rerun(args, False, True)
    moved = args["zc"].double() + args["delta"].double()
    new = (moved.var((1, 3, 4), correction=0, keepdim=True) + EPS).sqrt()
    before = (args["var"] + EPS).sqrt()[:, None, None]
    gamma, z = args["gamma"].double()[:, None, None].abs(), args["zc"].double().abs()
    # 8 roundings of |d| / s' + |z dvar| / (s s' (s + s')), where |dvar| <= s^2; with left = 1/4 nothing is retaken and
    # dvar carries its sums' TERMS roundings of 3 s^2, which s' magnifies by s^2 / s'^2.
    size = gamma * (z / new + z / new)
    mean = TERMS * gamma * 2 * z.mean((0, 2, 3), keepdim=True) / new  # of delta, from its sums
    amplified = TERMS * 3 * (before / new).square() if left == 0.25 else 0.0
    with running(runner):
        got = dzkernels.dense_batch_norm(**args)
    # zc is rounded, so its mean is not quite 0; the rerun takes it off.
    drift = 2 * gamma * args["zc"].double().mean((0, 2, 3), keepdim=True).abs() / new
    assert_bounded(got, wanted, UNIT[torch.float32] * (size * (8 + amplified) + mean) + drift)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [1, 2])
def test_nan_does_not_hide(runner: str, pool: int, training: bool) -> None:
    args = inputs((2, 2, 18, 4, 4), 1.0, pool)
    args["delta"][1, 0, 3, 1, 1] = float("nan")
    with running(runner):
        got = dzkernels.dense_batch_norm(**args, relu=True, training=training)
    hidden = got.isnan()
    assert not hidden[0].any()
    assert hidden[1, :, 3].all() if training else int(hidden.sum()) == 1
    assert not hidden[1, :, 4:].any()


@pytest.mark.parametrize("runner", RUNNERS)
def test_no_perturbation_and_no_gamma(runner: str) -> None:
    args = inputs((3, 2, 2, 5, 4), 1.0, 2)
    with running(runner):
        got = dzkernels.dense_batch_norm(**{**args, "delta": torch.zeros(0, 2, 2, 5, 4)})
        assert got.shape == (0, 2, 2, 2, 2)
        ones = dzkernels.dense_batch_norm(**{**args, "gamma": torch.ones(2)})
        assert_exact(dzkernels.dense_batch_norm(**{**args, "gamma": None}), ones)


@pytest.mark.parametrize("runner", [runner for runner in RUNNERS if runner != "reference"])
@pytest.mark.parametrize("shape", [(2, 9, 18, 24, 24), (13, 4, 3, 8, 8), (1, 1, 33, 5, 7)])
@pytest.mark.parametrize("pool", [1, 2])
def test_threads_do_not_matter(shape: tuple[int, ...], pool: int, runner: str) -> None:
    args = inputs(shape, 1.0, pool)
    args["residual"] = normal(shape[0], shape[1], *shape[3:], seed=6)
    args["residual_channel"] = integers([shape[0]], shape[2], seed=7)
    with running(runner):
        wanted = dzkernels.dense_batch_norm(**args, relu=True)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_exact(dzkernels.dense_batch_norm(**args, relu=True), wanted)


GOOD = inputs((3, 2, 4, 5, 6), 1.0, 2)
CHANNEL = {"residual": torch.zeros(3, 2, 5, 6), "residual_channel": torch.tensor([0, 3, 1])}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": 1.0}, TypeError, r"dz::dense_batch_norm: delta must be a tensor, got float"),
        ({"delta": GOOD["zc"]}, ValueError, r"delta must be of shape \[P, N, C, H, W\], got \[2, 4, 5, 6\]"),
        ({"delta": torch.zeros(3, 0, 4, 5, 6)}, ValueError, r"delta must be non-empty in N, C, H and W, got \[3, 0,"),
        ({"zc": GOOD["zc"].double()}, TypeError, r"zc must be float32, got float64"),
        ({"delta": GOOD["delta"].double()}, TypeError, r"zc must be float64, got float32"),
        (
            {"zc": GOOD["zc"][:1]},
            ValueError,
            r"zc must be of shape \[N, C, H, W\] = \[2, 4, 5, 6\], got \[1, 4, 5, 6\]",
        ),
        ({"zc": GOOD["zc"].to("meta")}, ValueError, r"zc must be on cpu like delta, got meta"),
        ({"var": GOOD["var"].float()}, TypeError, r"var must be float64, got float32"),
        ({"var": GOOD["var"][:3]}, ValueError, r"var must be of shape \[C\] = \[4\], got \[3\]"),
        ({"gamma": GOOD["gamma"].half()}, TypeError, r"gamma must be float32 or float64, got float16"),
        ({"gamma": GOOD["gamma"][:3]}, ValueError, r"gamma must be of shape \[C\] = \[4\], got \[3\]"),
        (
            {"residual": torch.zeros(3, 2, 5, 6)},
            ValueError,
            r"residual must be of shape \[P, N, C, H, W\] = \[3, 2, 4,",
        ),
        ({"residual": torch.zeros(3).long()}, TypeError, r"residual must be of a floating-point dtype, got int64"),
        ({**CHANNEL, "residual": None}, ValueError, r"residual must be given with residual_channel, got None"),
        (
            {**CHANNEL, "residual": GOOD["delta"]},
            ValueError,
            r"residual must be of shape \[P, N, H, W\] = \[3, 2, 5, 6\], got \[3, 2, 4, 5, 6\]",
        ),
        ({**CHANNEL, "residual": CHANNEL["residual"].bfloat16()}, TypeError, r"residual must be float32, got bfloat16"),
        ({**CHANNEL, "residual_channel": torch.zeros(3)}, TypeError, r"residual_channel must be int64, got float32"),
        (
            {**CHANNEL, "residual_channel": torch.tensor([0, 4, 0])},
            ValueError,
            r"residual_channel must be in 0..3 \(channels\), got 4",
        ),
        (
            {**CHANNEL, "residual_channel": torch.tensor([0])},
            ValueError,
            r"residual_channel must be of shape \[P\] = \[3\], got \[1\]",
        ),
        (
            {"residual": torch.zeros(GOOD["delta"].shape, device="meta")},
            ValueError,
            r"residual must be on cpu like delta",
        ),
        ({"relu": True, "y": None}, ValueError, r"y must be given with relu=True, got None"),
        ({"relu": True, "y": GOOD["y"].double()}, TypeError, r"y must be float32, got float64"),
        ({"relu": True, "y": GOOD["y"][:1]}, ValueError, r"y must be of shape \[N, C, H, W\] = \[2, 4, 5, 6\], got"),
        ({"gap": None}, ValueError, r"gap must be given with pool=2, got None"),
        ({"gap": GOOD["gap"][:, :3]}, ValueError, r"gap must be of shape \[N, C, H, W\] = \[2, 4, 5, 6\], got"),
        ({"pool": 0}, ValueError, r"pool must be an integer in 1..5 \(height and width\), got 0"),
        ({"pool": 6}, ValueError, r"pool must be an integer in 1..5 \(height and width\), got 6"),
        ({"pool": 2.0}, ValueError, r"pool must be an integer in 1..5 \(height and width\), got 2.0"),
        ({"eps": -1.0}, ValueError, r"eps must be at least 0, got -1.0"),
        ({"moments": torch.zeros(3, 2, 4)}, TypeError, r"moments must be float64, got float32"),
        (
            {"moments": torch.zeros(3, 4, 2).double()},
            ValueError,
            r"moments must be of shape \[P, 2, C\] = \[3, 2, 4\], got \[3, 4, 2\]",
        ),
        (
            {"moments": torch.zeros(3, 2, 4, dtype=torch.float64, device="meta")},
            ValueError,
            r"moments must be on cpu like delta, got meta",
        ),
        (
            {"moments": torch.zeros(3, 2, 4).double(), "training": False},
            ValueError,
            r"moments must be None with training=False",
        ),
        ({"eps": float("nan")}, ValueError, r"eps must be at least 0, got nan"),
        ({"out_dtype": torch.int64}, TypeError, r"out_dtype must be a floating-point dtype, got torch.int64"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.dense_batch_norm(**{**GOOD, **change})
