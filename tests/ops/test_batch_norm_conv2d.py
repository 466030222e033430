"""batch_norm_conv2d is dense_batch_norm and then a convolution, without the difference between them being stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dzkernels
from dzkernels._norm import moments
from helpers import RUNNERS, assert_bounded, assert_exact, integers, normal, running, small_ints, strided
from ops.cases.batch_norm_conv2d import SHAPES, Shape, by_rerun, convolved, inputs
from ops.cases.dense_batch_norm import last
from ops.moments import centred, moments_by_rerun


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [None, "dense", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_a_float64_rerun(
    shape: Shape, runner: str, dtype: torch.dtype, residual: str | None, relu: bool, training: bool
) -> None:
    args, sizes = inputs(shape, 0.1, dtype), shape[0]
    if residual == "channel":
        args["residual"] = normal(sizes[0], sizes[1], *sizes[3:], seed=6)
        args["residual_channel"] = integers([sizes[0]], sizes[2], seed=7)
    elif residual is not None:
        args["residual"] = last(normal(*sizes, seed=6)).to(dtype)
    wanted, bound = by_rerun(args, relu, training)
    with running(runner):
        got = dzkernels.batch_norm_conv2d(**args, relu=relu, training=training)
    assert got.movedim(2, -1).is_contiguous()
    assert got.dtype == dtype
    assert_bounded(got, wanted, bound)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_small_integers_bit_for_bit(shape: Shape, runner: str, dtype: torch.dtype) -> None:
    """With running statistics and gamma / s = 2 everything is exact; in bfloat16 up to the rounding of the sum."""
    sizes, (filters, *kernel), _ = shape
    base = small_ints(*sizes[1:], seed=1)
    args = inputs(shape, 1.0, dtype) | {
        "delta": last(small_ints(*sizes, seed=2)).to(dtype),
        "zc": base,
        "var": torch.full((sizes[2],), 0.25, dtype=torch.float64),
        "gamma": None,
        "eps": 0.0,
        "y": base,
        "weight": small_ints(filters, sizes[2], *kernel, seed=3).to(dtype),
    }
    moved = (base + 2 * args["delta"].float()).clamp_min(0) - base.clamp_min(0)
    with running(runner):
        got = dzkernels.batch_norm_conv2d(**args, training=False, relu=True)
    assert_exact(got, convolved(moved, args, args["weight"].float()).to(dtype))


@pytest.mark.parametrize("runner", RUNNERS)
def test_odd_memory_no_perturbation_and_no_gamma(runner: str) -> None:
    args = inputs(SHAPES[0].values[0], 0.1)
    args["residual"] = last(normal(*args["delta"].shape, seed=5))
    with running(runner):
        wanted = dzkernels.batch_norm_conv2d(**args, relu=True)
        odd = {name: strided(v) if isinstance(v, Tensor) else v for name, v in args.items()}
        assert_exact(dzkernels.batch_norm_conv2d(**odd, relu=True), wanted)
        none = args | {"delta": args["delta"][:0], "residual": None}
        assert dzkernels.batch_norm_conv2d(**none).shape == (0, *wanted.shape[1:])
        got, left = dzkernels.batch_norm_conv2d(**none, next_zc=centred(*wanted.shape[1:]))
        assert (got.shape, left.shape) == ((0, *wanted.shape[1:]), (0, 2, 16))
        ones = dzkernels.batch_norm_conv2d(**args | {"gamma": torch.ones(8)})
        assert_exact(dzkernels.batch_norm_conv2d(**args | {"gamma": None}), ones)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_of_the_norms_before_and_after(shape: Shape, runner: str, dtype: torch.dtype) -> None:
    args = inputs(shape, 0.1, dtype)
    wanted, bound = by_rerun(args, True, True)
    zc = centred(*wanted.shape[1:])
    args["moments"] = moments(args["delta"], args["zc"])
    with running(runner):
        got, left = dzkernels.batch_norm_conv2d(**args, relu=True, next_zc=zc)
    assert_bounded(got, wanted, bound)
    assert_bounded(left, *moments_by_rerun(got, zc))


@pytest.mark.parametrize("runner", RUNNERS)
def test_nan_stays_where_it_belongs(runner: str) -> None:
    args = inputs(((2, 2, 3, 5, 5), (4, 3, 3), (1, 1, 1)))
    args["delta"][1, 0, 1, 0, 0] = float("nan")
    with running(runner):
        got = dzkernels.batch_norm_conv2d(**args, training=False, relu=True).isnan()
    assert got[1, 0, :, :2, :2].all()
    assert int(got.sum()) == 4 * 4


def test_float64_runs_in_float64() -> None:
    args = inputs(SHAPES[0].values[0], 1e-7)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in args.items()}
    got = dzkernels.batch_norm_conv2d(**wide)
    assert got.dtype == torch.float64
    assert_bounded(got, by_rerun(args, False, True)[0], 1e-13)


GOOD = inputs(((2, 2, 3, 5, 6), (4, 3, 3), (1, 1, 1)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": 1.0}, TypeError, r"dz::batch_norm_conv2d: delta must be a tensor, got float"),
        ({"zc": GOOD["zc"].double()}, TypeError, r"dz::batch_norm_conv2d: zc must be float32, got float64"),
        ({"relu": True, "y": None}, ValueError, r"y must be given with relu=True, got None"),
        ({"eps": -1.0}, ValueError, r"eps must be at least 0, got -1.0"),
        ({"weight": GOOD["weight"].half()}, TypeError, r"weight must be float32 or bfloat16, got float16"),
        (
            {"weight": GOOD["weight"][:, :2]},
            ValueError,
            r"weight must be of shape \[O, C, kh, kw\] = \[\*, 3, \*, \*\], got \[4, 2, 3, 3\]",
        ),
        ({"weight": GOOD["weight"].to("meta")}, ValueError, r"weight must be on cpu like delta, got meta"),
        ({"moments": torch.zeros(2, 2, 3)}, TypeError, r"moments must be float64, got float32"),
        ({"next_zc": torch.zeros(2, 4, 5, 5)}, ValueError, r"\[N, O, Ho, Wo\] = \[2, 4, 5, 6\], got \[2, 4, 5, 5\]"),
        ({"stride": 0}, ValueError, r"stride must be one or two integers of at least 1, got 0"),
        ({"padding": (1, -1)}, ValueError, r"padding must be one or two integers of at least 0, got \(1, -1\)"),
        ({"dilation": 0}, ValueError, r"dilation must be one or two integers of at least 1, got 0"),
        ({"dilation": 4}, ValueError, r"kernel must be at most the padded input \[7, 8\], got \[3, 3\] with dilation"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.batch_norm_conv2d(**{**GOOD, **change})
