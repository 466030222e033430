"""Every row of the table: quotients by difference propagation against float64 quotients with the same step.

The same run holds every rule on its way to the family it declares.
"""

from __future__ import annotations

import contextlib

import pytest

from judge import judge
from rules.cases import ROWS, Case
from rules.families import contradictions
from rules.subject import Subject

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
def test_row(case: Case) -> None:
    subject = Subject(case)
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        for op in case.falls_back:
            stack.enter_context(pytest.warns(UserWarning, match=f"^{op} has no difference rule"))
        for mu in PLAIN_STEPS:
            plain, loss = subject.plain(mu)
            found += [f"mu {mu:g}: {v}" for v in judge(subject.ours(mu, "float32"), plain).faults(1e-5)]
            if mu in (1e-1, 5e-3):
                ours = subject.ours(mu, "float64")
                found += [f"float64, mu {mu:g}: {v}" for v in judge(ours, plain, noise(loss, mu)).faults(1e-11)]
            if mu in (5e-3, 1e-4):
                found += [f"bfloat16, mu {mu:g}: {v}" for v in judge(subject.ours(mu, "bfloat16"), plain).faults(2e-2)]
        for mu, tol in SMALL_STEPS.items():
            wide = subject.ours(mu, "float64")
            found += [f"mu {mu:g}: {v}" for v in judge(subject.ours(mu, "float32"), wide).faults(tol)]
        found += contradictions(subject)
    assert not found, "\n".join(found)


def test_every_row_has_every_parameter_sampled() -> None:
    for case in ROWS:
        subject = Subject(case)
        names = {name for name, p in subject.model.named_parameters() if p.requires_grad}
        assert {name for name, at in subject.where.items() if len(at)} == names
