"""conv2d_tap is the change of a convolution when one weight grows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dzkernels
from helpers import RUNNERS, assert_exact, integers, normal, running, small_ints, strided
from ops.cases.conv2d_tap import SHAPES, by_rerun, coordinates, geometry


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_a_rerun_bit_for_bit(shape: tuple[Any, ...], runner: str, layout: str) -> None:
    x = small_ints(*shape[:4], seed=1)
    coord, step = coordinates(shape, 9), 2.0 ** -integers([9], 4, seed=5).float()
    wanted = by_rerun(x, coord, step, shape)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x, coord, step = strided(x), strided(coord), strided(step)
    with running(runner):
        got = dzkernels.conv2d_tap(x, coord, step, **geometry(shape))
    assert got.is_contiguous()
    assert_exact(got, wanted)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_random_data_is_rounded_once(shape: tuple[Any, ...], runner: str) -> None:
    """One product per output: the float64 result, rounded, is the only right answer."""
    x, coord, step = normal(*shape[:4], seed=1), coordinates(shape, 7), normal(7, seed=2)
    with dzkernels.use_backend("reference"):
        wanted = dzkernels.conv2d_tap(x.double(), coord, step.double(), **geometry(shape)).float()
    with running(runner):
        assert_exact(dzkernels.conv2d_tap(x, coord, step, **geometry(shape)), wanted)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_geometry(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = draw(1, 3)
    kernel, stride = (draw(1, 4), draw(1, 4)), (draw(1, 4), draw(1, 4))
    padding, dilation = (draw(0, 4), draw(0, 4)), (draw(1, 3), draw(1, 3))
    height, width = draw(1, 9), draw(1, 9)
    assume(height + 2 * padding[0] > dilation[0] * (kernel[0] - 1))
    assume(width + 2 * padding[1] > dilation[1] * (kernel[1] - 1))
    shape = (
        draw(1, 3),
        groups * draw(1, 2),
        height,
        width,
        groups * draw(1, 2),
        kernel,
        stride,
        padding,
        dilation,
        groups,
    )
    x, coord, step = small_ints(*shape[:4], seed=1), coordinates(shape, 5), torch.full((5,), 0.5)
    wanted = by_rerun(x, coord, step, shape)
    for runner in RUNNERS:
        with running(runner):
            assert_exact(dzkernels.conv2d_tap(x, coord, step, **geometry(shape)), wanted)


@pytest.mark.parametrize("runner", RUNNERS)
def test_no_and_one_perturbation(runner: str) -> None:
    shape = (2, 3, 8, 8, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    x = small_ints(*shape[:4], seed=1)
    with running(runner):
        for count in (0, 1):
            coord = coordinates(shape, count)
            got = dzkernels.conv2d_tap(x, coord, torch.ones(count), **geometry(shape))
            assert got.shape == (count, 2, 8, 8)
            if count:
                assert_exact(got, by_rerun(x, coord, torch.ones(1), shape))


@pytest.mark.parametrize("runner", RUNNERS)
def test_padding_is_zero_even_where_the_input_is_not_finite(runner: str) -> None:
    x = torch.full((1, 1, 2, 2), float("inf"))
    with running(runner):
        got = dzkernels.conv2d_tap(
            x, torch.zeros(1, 4, dtype=torch.int64), torch.ones(1), kernel=3, padding=1, out_channels=1
        )
    inf = float("inf")
    assert_exact(got, torch.tensor([[[[0.0, 0.0], [0.0, inf]]]]))


def test_threads_do_not_matter() -> None:
    shape = (3, 6, 9, 8, 6, (3, 3), (2, 1), (2, 3), (2, 3), 6)
    x, coord, step = normal(*shape[:4], seed=1), coordinates(shape, 7), normal(7, seed=2)
    wanted = dzkernels.conv2d_tap(x, coord, step, **geometry(shape))
    torch.set_num_threads(3)
    assert_exact(dzkernels.conv2d_tap(x, coord, step, **geometry(shape)), wanted)


GOOD: dict[str, Any] = {
    "x": torch.zeros(2, 4, 5, 5),
    "coord": torch.zeros(3, 4, dtype=torch.int64),
    "step": torch.ones(3),
    "kernel": 3,
    "groups": 2,
    "out_channels": 6,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"dz::conv2d_tap: x must be a tensor, got list"),
        (
            {"x": torch.zeros(2, 4, 5, 5, dtype=torch.int64)},
            TypeError,
            r"dz::conv2d_tap: x must be of a floating-point dtype, got int64",
        ),
        ({"x": torch.zeros(4, 5, 5)}, ValueError, r"x must be of shape \[N, Cin, H, W\], got \[4, 5, 5\]"),
        ({"coord": torch.zeros(3, 4, dtype=torch.int32)}, TypeError, r"coord must be int64, got int32"),
        (
            {"coord": torch.zeros(3, 3, dtype=torch.int64)},
            ValueError,
            r"coord must be of shape \[P, 4\] = \[\*, 4\], got \[3, 3\]",
        ),
        (
            {"coord": torch.tensor([[0, 0, 0, 0], [5, 1, 2, 3], [0, 0, 0, 0]])},
            ValueError,
            r"coord must be inside the weight \[6, 2, 3, 3\], got coord\[1\] = \[5, 1, 2, 3\]",
        ),
        (
            {"coord": torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, -1, 0, 0]])},
            ValueError,
            r"got coord\[2\] = \[0, -1, 0, 0\]",
        ),
        ({"step": torch.ones(2)}, ValueError, r"step must be of shape \[P\] = \[3\], got \[2\]"),
        ({"step": torch.ones(3, dtype=torch.float64)}, TypeError, r"step must be float32, got float64"),
        ({"coord": GOOD["coord"].to("meta")}, ValueError, r"coord must be on cpu like x, got meta"),
        ({"kernel": 0}, ValueError, r"kernel must be one or two integers of at least 1, got 0"),
        ({"kernel": (1, 2, 3)}, ValueError, r"kernel must be one or two integers of at least 1, got \(1, 2, 3\)"),
        ({"stride": 0}, ValueError, r"stride must be one or two integers of at least 1, got 0"),
        ({"padding": -1}, ValueError, r"padding must be one or two integers of at least 0, got -1"),
        ({"dilation": 1.5}, (ValueError, TypeError), r"dilation must be one or two integers of at least 1, got 1.5"),
        ({"groups": 3}, ValueError, r"groups must be a divisor of the 4 channels of x, got 3"),
        ({"out_channels": 5}, ValueError, r"out_channels must be a positive multiple of groups = 2, got 5"),
        (
            {"kernel": 4, "dilation": 2},
            ValueError,
            r"kernel must be at most the padded input \[5, 5\], got \[4, 4\] with dilation \[2, 2\]",
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.conv2d_tap(**{**GOOD, **change})
