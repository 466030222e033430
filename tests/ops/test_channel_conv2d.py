"""channel_conv2d is a convolution whose input differs in one channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dzkernels
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, integers, normal, running, small_ints, strided
from ops.cases.channel_conv2d import SHAPES, by_dense, geometry


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_is_the_dense_convolution_bit_for_bit(shape: tuple[Any, ...], runner: str, layout: str) -> None:
    samples, height, width, rows, per_group, kernel, *_, groups = shape
    delta, channel = small_ints(6, samples, height, width, seed=1) * 0.25, integers([6], per_group * groups, seed=2)
    weight = small_ints(rows, per_group, *kernel, seed=3)
    wanted = by_dense(delta, channel, weight, shape)
    if layout == "channels_last":
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        delta, channel, weight = strided(delta), strided(channel), strided(weight)
    with running(runner):
        got = dzkernels.channel_conv2d(delta, channel, weight, **geometry(shape))
    assert got.permute(0, 1, 3, 4, 2).is_contiguous()
    assert_exact(got, wanted)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_random_data_is_within_its_roundings(shape: tuple[Any, ...], runner: str) -> None:
    """kh kw products and as many sums: each output is off by at most kh kw + 1 roundings of the sum of magnitudes."""
    samples, height, width, rows, per_group, kernel, *_, groups = shape
    delta, channel = normal(5, samples, height, width, seed=1), integers([5], per_group * groups, seed=2)
    weight = normal(rows, per_group, *kernel, seed=3)
    wanted = by_dense(delta.double(), channel, weight.double(), shape)
    bound = by_dense(delta.double().abs(), channel, weight.double().abs(), shape)
    with running(runner):
        got = dzkernels.channel_conv2d(delta, channel, weight, **geometry(shape))
    assert_bounded(got, wanted, (kernel[0] * kernel[1] + 1) * UNIT[torch.float32] * bound)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_geometry(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = draw(1, 3)
    kernel, stride = (draw(1, 4), draw(1, 4)), (draw(1, 4), draw(1, 4))
    padding, dilation = (draw(0, 4), draw(0, 4)), (draw(1, 3), draw(1, 3))
    height, width = draw(1, 9), draw(1, 20)
    assume(height + 2 * padding[0] > dilation[0] * (kernel[0] - 1))
    assume(width + 2 * padding[1] > dilation[1] * (kernel[1] - 1))
    shape = (draw(1, 3), height, width, groups * draw(1, 40), draw(1, 3), kernel, stride, padding, dilation, groups)
    delta, channel = small_ints(3, shape[0], height, width, seed=1), integers([3], shape[4] * groups, seed=2)
    weight = small_ints(shape[3], shape[4], *kernel, seed=3)
    wanted = by_dense(delta, channel, weight, shape)
    for runner in RUNNERS:
        with running(runner):
            assert_exact(dzkernels.channel_conv2d(delta, channel, weight, **geometry(shape)), wanted)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 16, 18, 33, 64])
def test_another_dtype_is_one_more_rounding(runner: str, dtype: torch.dtype, rows: int) -> None:
    delta, channel, weight = normal(4, 3, 5, 7, seed=1), integers([4], 3, seed=2), normal(rows, 3, 3, 3, seed=3)
    with running(runner):
        wanted = dzkernels.channel_conv2d(delta, channel, weight, padding=1)
        got = dzkernels.channel_conv2d(delta, channel, weight, padding=1, out_dtype=dtype)
        none = dzkernels.channel_conv2d(delta[:0], channel[:0], weight, padding=1, out_dtype=dtype)
    assert got.permute(0, 1, 3, 4, 2).is_contiguous()
    assert_exact(got, wanted.to(dtype))
    assert none.dtype == dtype


@pytest.mark.parametrize("runner", RUNNERS)
def test_no_and_one_perturbation(runner: str) -> None:
    weight = small_ints(6, 2, 3, 3, seed=0)
    with running(runner):
        for count in (0, 1):
            got = dzkernels.channel_conv2d(torch.ones(count, 2, 5, 5), torch.zeros(count, dtype=torch.int64), weight)
            assert got.shape == (count, 2, 6, 3, 3)
        assert_exact(got[0, 0, :, 1, 1], weight[:, 0].sum((1, 2)))


@pytest.mark.parametrize("runner", [runner for runner in RUNNERS if runner != "reference"])
def test_threads_do_not_matter(runner: str) -> None:
    delta, channel, weight = normal(5, 3, 9, 9, seed=1), integers([5], 4, seed=2), normal(20, 4, 3, 3, seed=3)
    with running(runner):
        wanted = dzkernels.channel_conv2d(delta, channel, weight, padding=1)
        torch.set_num_threads(3)
        assert_exact(dzkernels.channel_conv2d(delta, channel, weight, padding=1), wanted)


@pytest.mark.parametrize("runner", RUNNERS)
def test_nan_stays_where_it_belongs(runner: str) -> None:
    delta = torch.zeros(2, 1, 5, 5)
    delta[0, 0, 0, 0] = float("nan")
    with running(runner):
        got = dzkernels.channel_conv2d(delta, torch.zeros(2, dtype=torch.int64), torch.ones(17, 1, 3, 3))
    assert got[0, 0, :, 0, 0].isnan().all()
    assert int(got.isnan().sum()) == 17


GOOD: dict[str, Any] = {
    "delta": torch.zeros(3, 2, 5, 5),
    "channel": torch.zeros(3, dtype=torch.int64),
    "weight": torch.zeros(6, 2, 3, 3),
    "groups": 2,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": None}, TypeError, r"dz::channel_conv2d: delta must be a tensor, got NoneType"),
        ({"delta": torch.zeros(3, 5, 5)}, ValueError, r"delta must be of shape \[P, N, H, W\], got \[3, 5, 5\]"),
        ({"channel": torch.zeros(3)}, TypeError, r"channel must be int64, got float32"),
        (
            {"channel": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"channel must be of shape \[P\] = \[3\], got \[4\]",
        ),
        ({"channel": torch.tensor([0, 4, 1])}, ValueError, r"channel must be in 0..3 \(input channels\), got 4"),
        ({"channel": torch.tensor([0, -2, 1])}, ValueError, r"channel must be in 0..3 \(input channels\), got -2"),
        ({"weight": torch.zeros(6, 2, 3, 3).double()}, TypeError, r"weight must be float32, got float64"),
        ({"weight": torch.zeros(6, 2, 3)}, ValueError, r"weight must be of shape \[O, Cg, kh, kw\], got \[6, 2, 3\]"),
        ({"weight": torch.zeros(6, 2, 3, 3, device="meta")}, ValueError, r"weight must be on cpu like delta, got meta"),
        ({"stride": (1, 0)}, ValueError, r"stride must be one or two integers of at least 1, got \(1, 0\)"),
        ({"padding": -1}, ValueError, r"padding must be one or two integers of at least 0, got -1"),
        ({"dilation": 0}, ValueError, r"dilation must be one or two integers of at least 1, got 0"),
        ({"out_dtype": torch.int8}, TypeError, r"out_dtype must be a floating-point dtype, got torch.int8"),
        ({"groups": 4}, ValueError, r"groups must divide the 6 rows of weight, got 4"),
        ({"dilation": 3}, ValueError, r"kernel must be at most the padded input \[5, 5\], got \[3, 3\] with dilation"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.channel_conv2d(**{**GOOD, **change})
