"""The comparison helpers fail when they should."""

from __future__ import annotations

import pytest
import torch

from helpers import UNIT, assert_bounded, assert_exact, integers, normal, small_ints, strided

NAN, INF = float("nan"), float("inf")


def test_exact_accepts_equal_numbers_and_both_zeros() -> None:
    assert_exact(torch.tensor([1.0, 0.0, INF]), torch.tensor([1.0, -0.0, INF]))
    assert_exact(torch.empty(0, 3), torch.empty(0, 3))


@pytest.mark.parametrize(
    ("got", "wanted", "message"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 2**-22]), r"not equal: 1 of 2 elements; first at \[1\]"),
        (torch.tensor([NAN]), torch.tensor([NAN]), "not equal"),
        (torch.tensor([NAN]), torch.tensor([1.0]), "not equal"),
        (torch.tensor([1.0]), torch.tensor([NAN]), "not equal"),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), "shape"),
        (torch.empty(0, 3), torch.empty(3, 0), "shape"),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), "dtype"),
    ],
)
def test_exact_refuses(got: torch.Tensor, wanted: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_exact(got, wanted)


def test_bounded_accepts_what_is_inside() -> None:
    assert_bounded(torch.tensor([1.0, INF]), torch.tensor([1.5, INF]), 0.5)
    assert_bounded(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize(
    ("got", "wanted", "bound", "message"),
    [
        (1.0, 1.6, 0.5, "out of bounds: 1 of 1"),
        (NAN, 1.0, 0.5, "out of bounds"),
        (1.0, NAN, 0.5, "out of bounds"),
        (NAN, NAN, INF, "out of bounds"),
        (INF, -INF, 0.5, "out of bounds"),
        (INF, 1.0, 0.5, "out of bounds"),
        (1.0, 1.0, NAN, "bound itself"),
        (1.0, 1.0, -1.0, "bound itself"),
    ],
)
def test_bounded_refuses(got: float, wanted: float, bound: float, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_bounded(torch.tensor([got]), torch.tensor([wanted]), bound)


def test_one_wrong_element_is_seen_among_many() -> None:
    wanted = normal(100, 100, seed=0)
    got = wanted.clone()
    got[37, 5] += 1e-3
    with pytest.raises(AssertionError, match=r"1 of 10000 elements; first at \[37, 5\]"):
        assert_bounded(got, wanted, 1e-6)


def test_bounded_refuses_another_shape() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_bounded(torch.ones(2), torch.ones(1), 1.0)


def test_data_builders() -> None:
    values = small_ints(50, 50, seed=1)
    assert values.dtype == torch.float32
    assert values.min() == -4
    assert values.max() == 4
    assert torch.equal(values, values.round())
    assert torch.equal(normal(3, seed=1), normal(3, seed=1))
    assert not torch.equal(normal(3, seed=1), normal(3, seed=2))
    assert integers([100], 3, seed=0).unique().tolist() == [0, 1, 2]


def test_strided_is_contiguous_nowhere_and_keeps_values() -> None:
    values = normal(2, 3, 4, seed=0)
    view = strided(values)
    assert torch.equal(view, values)
    assert all(stride > 1 for stride in view.stride())
    assert torch.equal(strided(torch.arange(5)), torch.arange(5))


def test_unit_is_half_an_epsilon() -> None:
    for dtype, unit in UNIT.items():
        assert unit == torch.finfo(dtype).eps / 2
