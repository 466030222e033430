"""The table itself: registration, strictness, the fallback, and float64 exactness whatever the model casts to."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepzero as dz
from deepzero.errors import NoRuleError
from deepzero.rules import RULES, rule
from judge import judge
from rules.cases import Case, Fn, readout, supervised
from rules.subject import Subject

aten = torch.ops.aten


def test_registering_twice_raises() -> None:
    with pytest.raises(ValueError, match=r"aten\.relu\.default already has a rule: pointwise relu"):
        rule(aten.relu.default, family="pointwise")(lambda run, node: None)


def test_registering_a_linear_map_twice_raises() -> None:
    from deepzero.rules.registry import linear

    before = RULES[aten.cat.default]
    with pytest.raises(ValueError, match=r"aten\.cat\.default already has a rule: linear"):
        linear(aten.cat.default)
    assert RULES[aten.cat.default] is before


def test_every_op_is_a_real_overload_with_a_callable_rule() -> None:
    assert len(RULES) > 150
    for op, entry in RULES.items():
        assert isinstance(op, torch._ops.OpOverload), op
        assert callable(entry.function)


def _unruled(h: Tensor, g: Tensor) -> Tensor:
    return torch.special.i0e(h) * g


def _model() -> Fn:
    torch.manual_seed(0)
    return Fn(_unruled)


OBJECTIVE = supervised(readout)


def test_strict_names_the_op_without_a_rule() -> None:
    estimator = dz.CGE(_model(), OBJECTIVE, strict=True)
    with pytest.raises(NoRuleError, match=r"^aten\.special_i0e\.default has no difference rule and strict=True"):
        estimator.estimate(((torch.randn(4, 6),), ()))


def test_the_fallback_is_right_and_warns_once() -> None:
    case = Case("fallback", _model, lambda: ((torch.randn(4, 6),), ()), OBJECTIVE, falls_back=("special_i0e",))
    subject = Subject(case)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        got = {mu: subject.ours(mu, "float32") for mu in (1e-1, 1e-2, 1e-4)}
    ours = [str(w.message) for w in seen if "no difference rule" in str(w.message)]
    assert len(ours) == 1
    assert ours[0].startswith("aten.special_i0e.default has no difference rule: it is evaluated in float64")
    for mu, quotients in got.items():
        assert not judge(quotients, subject.plain(mu)[0]).faults(1e-5), f"mu {mu:g}"


def test_random_op_whose_distribution_moves_is_an_error() -> None:
    def objective(model: nn.Module, batch: Any) -> Tensor:
        return torch.poisson(torch.exp(model(batch))).sum() + model(batch).sum()

    estimator = dz.CGE(nn.Linear(6, 2), objective)
    with pytest.raises(NoRuleError, match=r"poisson.* draws random numbers whose distribution depends"):
        estimator.estimate(torch.randn(3, 6))


def test_rrelu_in_training_is_an_error() -> None:
    estimator = dz.CGE(nn.Sequential(nn.Linear(6, 4), nn.RReLU(), nn.Linear(4, 2)), OBJECTIVE)
    with pytest.raises(NoRuleError, match=r"rrelu.* draws random numbers"):
        estimator.estimate(((torch.randn(3, 6),), ()))


class Casts(nn.Module):
    """What models do to their own dtypes: at most float32, so a float64 copy that skips the casts is the reference."""

    def __init__(self, casts: bool = True) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)
        self.casts = casts

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).tanh()
        if self.casts:
            h = h.to(torch.float32) * torch.full((8,), 0.5, dtype=torch.float32)
            h = h.float() + torch.zeros(8, dtype=torch.float32)
            return nn.functional.softmax(self.two(h), -1, dtype=torch.float32).type(torch.float32)
        return self.two(h * 0.5).softmax(-1)


def test_the_models_own_casts_do_not_make_the_base_pass_float32() -> None:
    """At mu = 1e-6 a float32 base pass would be off by 1e-3; the float64 twin without casts is the reference."""
    torch.manual_seed(0)
    cast, plain = Casts(), Casts(casts=False)
    plain.load_state_dict(cast.state_dict())
    batch = ((torch.randn(4, 6),), ())
    for mu in (1e-2, 1e-6):
        got = dz.CGE(cast, OBJECTIVE, mu=mu, strict=True).estimate(batch).grads
        want = dz.CGE(plain, OBJECTIVE, mu=mu, strict=True, precision="float64").estimate(batch).grads
        judge(got, want).check(1e-5)


def test_base_values_are_float64_at_every_node() -> None:
    model = Casts()
    estimator = dz.CGE(model, OBJECTIVE)
    with estimator.engine.prepared(((torch.randn(4, 6),), ())) as ready:
        assert ready.base is not None
        for node in ready.base.graph.graph.nodes:
            value = ready.base._exact.get(node)
            if isinstance(value, Tensor) and value.is_floating_point():
                assert value.dtype is torch.float64, node


@pytest.mark.parametrize("id", ["resnet-block", "transformer-encoder", "lstm", "loss-cross-entropy"])
def test_blocks_change_nothing_but_rounding(id: str) -> None:
    """The library's own kernels may sum in another order for another batch size; a fixed partition repeats its bits."""
    from rules.cases import ROWS

    case = next(case for case in ROWS if case.id == id)
    subject = Subject(case)

    def estimate(block: int | None) -> dict[str, Tensor]:
        torch.manual_seed(1)
        estimator = dz.CGE(subject.model, case.objective, mu=5e-3, block=block, strict=True)
        estimator.engine.cache = subject.estimator("float32").engine.cache
        return estimator.estimate(subject.batch, subject.mask).grads

    results = {block: estimate(block) for block in (None, 1, 3)}
    for block, grads in results.items():
        again = estimate(block)
        assert all(torch.equal(grads[name], again[name]) for name in grads), f"block {block}: not repeatable"
    everything = torch.cat([g.flatten() for g in results[None].values()])
    for block in (1, 3):
        other = torch.cat([g.flatten() for g in results[block].values()])
        assert float((other - everything).norm()) <= 1e-6 * float(everything.norm()), f"block {block}"
