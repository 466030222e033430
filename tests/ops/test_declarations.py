"""What a declaration says of tensors is what a call is held to, each time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dzkernels import _op
from dzkernels._op import BASE, BASE_OR_BFLOAT16, INT64, LEAD, LIKE, Arg, Op


@pytest.fixture
def op() -> Iterator[Op]:
    yield Op(
        "package.sums",
        Arg("delta", "P, A B, K", LEAD, filled="K"),
        Arg("weight", "2 A + B, 3", LIKE),
        Arg("base", "A, B", BASE),
        Arg("half", "K, *s", BASE_OR_BFLOAT16, optional=True),
        Arg("index", "P", INT64, optional=True, below="K", what="columns"),
    )
    del _op.DECLARED["sums"]


def zeros(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*sizes, dtype=dtype)


GOOD = (zeros(2, 15, 4), zeros(11, 3), zeros(3, 5))


def test_sizes_are_bound_across_tensors(op: Op) -> None:
    for _ in range(2):  # the second call remembers the first
        sizes = op(*GOOD, zeros(4, 6, 7), None)
        assert {dim: sizes[dim] for dim in "PABK"} == {"P": 2, "A": 3, "B": 5, "K": 4}
        sizes["P"] = 0  # the caller's own
    assert op(*(t.double() for t in GOOD), zeros(4, dtype=torch.bfloat16), None)["A"] == 3


@pytest.mark.parametrize(
    ("at", "wrong", "error", "message"),
    [
        (0, 1.0, TypeError, r"dz::sums: delta must be a tensor, got float"),
        (0, zeros(2, 14, 4), ValueError, r"delta must be of shape \[P, A B, K\] = \[\*, 15, \*\], got \[2, 14, 4\]"),
        (0, zeros(2, 15, 0), ValueError, r"delta must be non-empty in K, got \[2, 15, 0\]"),
        (1, zeros(12, 3), ValueError, r"weight must be of shape \[2 A \+ B, 3\] = \[11, 3\], got \[12, 3\]"),
        (1, GOOD[1].double(), TypeError, r"weight must be float32, got float64"),
        (1, None, TypeError, r"weight must be a tensor, got NoneType"),
        (2, zeros(3), ValueError, r"base must be of shape \[A, B\], got \[3\]"),
        (2, GOOD[2].to("meta"), ValueError, r"base must be on cpu like delta, got meta"),
        (3, zeros(4, dtype=torch.float16), TypeError, r"half must be float32 or bfloat16, got float16"),
        (3, zeros(3, 6), ValueError, r"half must be of shape \[K, \*s\] = \[4, \*\], got \[3, 6\]"),
        (4, torch.tensor([0, 4]), ValueError, r"index must be in 0..3 \(columns\), got 4"),
    ],
)
def test_wrong_tensors(op: Op, at: int, wrong: object, error: type[Exception], message: str) -> None:
    tensors: list[object] = [*GOOD, None, None]
    op(*tensors)  # type: ignore[arg-type]
    tensors[at] = wrong
    for _ in range(2):
        with pytest.raises(error, match=message):
            op(*tensors)  # type: ignore[arg-type]


def test_indices_are_looked_at_each_time(op: Op) -> None:
    op(*GOOD, None, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"index must be in 0..3 \(columns\), got -1"):
        op(*GOOD, None, torch.tensor([0, -1]))


def test_no_perturbations_need_no_numbers(op: Op) -> None:
    assert op(zeros(0, 15, 0), *GOOD[1:], None, None)["K"] == 0


def test_few_shapes_are_remembered(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_op, "_MAX_PASSED", 3)
    for count in range(1, 9):
        op(zeros(count, 15, 4), *GOOD[1:], None, None)
        assert len(op._passed) <= 3
