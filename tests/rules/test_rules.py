"""Every row of the table: quotients by difference propagation against float64 quotients with the same step."""

from __future__ import annotations

import contextlib

import pytest
import torch

import deepzero.run
from rules.cases import ROWS, Case
from rules.judge import Subject, violations

EPS64 = 2.0**-52

PLAIN_STEPS = (1e-1, 1e-2, 5e-3, 1e-4)
"""Steps at which whole float64 losses can be subtracted."""

SMALL_STEPS = {1e-6: 1e-5, 1e-8: 5e-5}
"""Steps at which only differences have digits left, and the tolerance of each."""


def noise(loss: float, mu: float) -> float:
    """What a quotient of two float64 losses carries: each is right to a few dozen roundings of its sum's terms."""
    return 64 * EPS64 * max(1.0, abs(loss)) / mu


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch, in the reference
@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_row(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepzero.run, "_warned", set())
    subject = Subject(case)
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        for op in case.falls_back:
            stack.enter_context(pytest.warns(UserWarning, match=f"^{op} has no difference rule"))
        for mu in PLAIN_STEPS:
            plain, loss = subject.plain(mu)
            found += [f"mu {mu:g}: {v}" for v in violations(subject.ours(mu, "float32"), plain, 1e-5)]
            if mu in (1e-1, 5e-3):
                ours = subject.ours(mu, "float64")
                found += [f"float64, mu {mu:g}: {v}" for v in violations(ours, plain, 1e-11, noise(loss, mu))]
            if mu in (5e-3, 1e-4):
                found += [f"bfloat16, mu {mu:g}: {v}" for v in violations(subject.ours(mu, "bfloat16"), plain, 2e-2)]
        for mu, tol in SMALL_STEPS.items():
            wide = subject.ours(mu, "float64")
            found += [f"mu {mu:g}: {v}" for v in violations(subject.ours(mu, "float32"), wide, tol)]
    assert not found, "\n".join(found)


def test_the_judge_sees_one_wrong_tensor() -> None:
    want = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": torch.tensor([3.0], dtype=torch.float64)}
    assert violations(want, want, 1e-5) == []
    near = {"w": want["w"] * (1 + 9e-6), "b": want["b"]}
    assert violations(near, want, 1e-5) == []
    off = {"w": want["w"] * (1 + 3e-5), "b": want["b"]}
    assert [v.split(":")[0] for v in violations(off, want, 1e-5)] == ["w"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_judge_refuses_nan_and_infinity(bad: float) -> None:
    fine = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    wrong = {"w": torch.tensor([1.0, bad], dtype=torch.float64)}
    assert violations(wrong, fine, 1e-5)
    assert violations(fine, wrong, 1e-5)


def test_the_judge_knows_a_tensor_whose_gradient_is_zero() -> None:
    """A bias before batch norm: rounding is allowed, in proportion to the whole gradient."""
    want = {"w": torch.tensor([1.0], dtype=torch.float64), "b": torch.tensor([0.0], dtype=torch.float64)}
    assert violations({"w": want["w"], "b": torch.tensor([6e-8]).double()}, want, 1e-5) == []
    assert violations({"w": want["w"], "b": torch.tensor([8e-8]).double()}, want, 1e-5)


def test_every_row_has_every_parameter_sampled() -> None:
    for case in ROWS[::10]:
        subject = Subject(case)
        names = {name for name, p in subject.model.named_parameters() if p.requires_grad}
        assert {name for name, at in subject.where.items() if len(at)} == names
