"""The check of families (``families.py``, run on every row by ``test_rules.py``) sees a wrong one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from deepzero.carriers import Dense, dense
from deepzero.graph.ops import HALF_TO_FLOAT, KEPT_WHOLE
from deepzero.rules import RULES, Family, rule
from rules.cases import Case, readout, seq, supervised
from rules.families import fault, seen_in
from rules.subject import Subject

aten = torch.ops.aten


def network(middle: type[nn.Module]) -> Subject:
    made = seq(lambda: nn.Linear(6, 8), middle, lambda: nn.Linear(8, 5))
    return Subject(Case("network", made, lambda: ((torch.randn(4, 6),), ()), supervised(readout)))


def faults(subject: Subject, op: Any, family: Family) -> set[str]:
    wrong = replace(RULES[op], family=family)
    return {text for seen in seen_in(subject) if seen.node.target is op and (text := fault(seen, wrong))}


@pytest.mark.parametrize(
    ("layer", "op", "family", "message"),
    [
        (nn.Tanh, aten.tanh.default, "linear", "twice the difference does not give twice the result"),
        (nn.Tanh, aten.tanh.default, "rearranges", "an entry of the result is none of the operands"),
        (nn.Tanh, aten.tanh.default, "constant", "the result moves"),
        (lambda: nn.Softmax(-1), aten._softmax.default, "pointwise", "an entry moves where no operand does"),
    ],
    ids=["linear", "rearranges", "constant", "pointwise"],
)
def test_a_wrong_family_is_seen(layer: Any, op: Any, family: Family, message: str) -> None:
    subject = network(layer)
    assert message in faults(subject, op, family)
    assert not faults(subject, op, RULES[op].family)


def test_a_rule_that_makes_one_channel_dense_is_not_pointwise(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES[aten.tanh.default]
    monkeypatch.setitem(RULES, aten.tanh.default, replace(right, function=lambda b, n: Dense(dense(right(b, n)))))
    assert faults(network(nn.Tanh), aten.tanh.default, "pointwise") == {"one channel came in and many go out"}


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"family must be one of pointwise, discrete, .*, opaque, got 'view'"):
        rule(aten.special_i0e.default, family="view")  # type: ignore[arg-type]
    assert aten.special_i0e.default not in RULES


def test_ops_below_the_rules_have_rules() -> None:
    assert RULES.keys() >= KEPT_WHOLE | HALF_TO_FLOAT
