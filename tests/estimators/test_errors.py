"""Bad input: the error names the thing, what was expected, what came and the fix, before any query is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero.baselines import ForwardGE
from deepzero.errors import BudgetError, MaskError, NoRuleError, ObjectiveError, StepError
from deepzero.estimators import CGE, ESTIMATORS, RGE, HybridGE, LayerwiseRGE, StaleGE
from deepzero.report.check import check

KINDS = [*ESTIMATORS.values(), ForwardGE]


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    net[2].bias.requires_grad_(False)
    return net


def objective(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(b[0]), b[1])


def batch() -> tuple[Tensor, Tensor]:
    return torch.ones(6, 5), torch.zeros(6, dtype=torch.int64)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


MASKS: list[tuple[str, Any, str]] = [
    (
        "unknown name",
        {"0.wieght": ones(4, 5)},
        r"the mask names '0\.wieght', which is no parameter of the model\. Did you mean '0\.weight'",
    ),
    ("shape", {"0.weight": ones(5, 4)}, r"mask\['0\.weight'\] must have the parameter's shape \[4, 5\], got \[5, 4\]"),
    ("dtype", {"0.weight": torch.ones(4, 5)}, r"mask\['0\.weight'\] must be a bool tensor, got torch\.float32.*\.bool"),
    ("no tensor", {"0.weight": [True]}, r"mask\['0\.weight'\] must be a bool tensor, got list"),
    ("frozen", {"2.bias": ones(3)}, r"mask names '2\.bias', which cannot be estimated: it does not require grad"),
    ("nothing selected", {"0.weight": ~ones(4, 5)}, "the mask selects no coordinate"),
    ("empty", {}, "the mask selects no coordinate"),
]


@pytest.mark.parametrize(("mask", "text"), [m[1:] for m in MASKS], ids=[m[0] for m in MASKS])
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind: Any, mask: Any, text: str) -> None:
    calls = []

    def counting(m: nn.Module, b: Any) -> Tensor:
        calls.append(1)
        return objective(m, b)

    with pytest.raises(MaskError, match=text):
        kind(model(), counting).estimate(batch(), mask)
    assert not calls


def test_a_tied_name_points_to_its_twin() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    with pytest.raises(MaskError, match=r"it is the same tensor as '0\.weight': mask that name"):
        CGE(net, lambda m, b: m(b).sum()).estimate(torch.ones(2, 3), {"1.weight": ones(3, 3)})


def test_nothing_to_estimate() -> None:
    net = model().requires_grad_(False)
    with pytest.raises(MaskError, match="the model has no parameter that requires grad"):
        CGE(net, objective).estimate(batch())


OBJECTIVES: list[tuple[str, Any, str]] = [
    ("vector", lambda m, b: m(b[0]).sum(1), r"must return one number, got a tensor of shape \[6\]\. Reduce it"),
    ("python number", lambda m, b: 1.5, "must return a tensor with one element, got float"),
    ("none", lambda m, b: None, "must return a tensor with one element, got NoneType"),
    ("complex", lambda m, b: m(b[0]).sum().to(torch.complex64), "must return a real number, got dtype torch.complex64"),
    ("nan", lambda m, b: m(b[0]).sum() * float("nan"), "the loss is nan before any perturbation"),
    ("inf", lambda m, b: m(b[0]).sum() * 0 + float("inf"), "the loss is inf before any perturbation"),
]


@pytest.mark.parametrize(("function", "text"), [o[1:] for o in OBJECTIVES], ids=[o[0] for o in OBJECTIVES])
@pytest.mark.parametrize("kind", KINDS)
def test_objectives(kind: Any, function: Any, text: str) -> None:
    with pytest.raises(ObjectiveError, match=text):
        kind(model(), function).estimate(batch())


ARGUMENTS: list[tuple[str, Any, type[Exception], str]] = [
    ("mu 0", lambda: CGE(model(), objective, mu=0), StepError, "mu must be a positive finite step"),
    ("mu nan", lambda: CGE(model(), objective, mu=float("nan")), StepError, "mu must be a positive finite step"),
    (
        "scheme",
        lambda: CGE(model(), objective, scheme="back"),
        ValueError,
        "scheme must be one of 'forward', 'central'",
    ),
    ("precision", lambda: CGE(model(), objective, precision="half"), ValueError, "precision must be one of 'float32'"),
    ("block", lambda: CGE(model(), objective, block=0), ValueError, "block must be a positive number"),
    ("queries", lambda: RGE(model(), objective, queries=0), ValueError, "queries must be a positive number of direc"),
    (
        "law",
        lambda: RGE(model(), objective, distribution="cauchy"),
        ValueError,
        "distribution must be one of 'gaussian'",
    ),
    (
        "too many orthogonal",
        lambda: RGE(model(), objective, queries=37, distribution="orthogonal").estimate(batch()),
        ValueError,
        "queries = 37 directions cannot be orthogonal in the 36 dimensions that are selected. Use at most 36",
    ),
    (
        "too many orthogonal, masked",
        lambda: ForwardGE(model(), objective, queries=5, distribution="orthogonal").estimate(
            batch(), {"0.bias": ones(4)}
        ),
        ValueError,
        "queries = 5 directions cannot be orthogonal in the 4 dimensions",
    ),
    ("hybrid queries", lambda: HybridGE(model(), objective, queries=0), ValueError, "queries must be a positive numb"),
    (
        "fewer directions than layers",
        lambda: LayerwiseRGE(model(), objective, queries=2),
        ValueError,
        r"queries must be at least one direction for each of the model's 3 layers, got 2",
    ),
    ("forward queries", lambda: ForwardGE(model(), objective, queries=0), ValueError, "queries must be a positive num"),
    (
        "unknown pattern",
        lambda: HybridGE(model(), objective, coordinates=["0.*", "0.wieght"]),
        MaskError,
        r"no parameter that requires grad matches '0\.wieght'\. Did you mean '0\.weight'",
    ),
    (
        "frozen pattern",
        lambda: HybridGE(model(), objective, coordinates="2.bias"),
        MaskError,
        r"no parameter that requires grad matches '2\.bias'",
    ),
    ("no pattern", lambda: HybridGE(model(), objective, coordinates=()), MaskError, "random directions: use dz.RGE"),
    ("every", lambda: HybridGE(model(), objective, coordinates="*"), MaskError, "takes in every weight.*use dz.CGE"),
    ("number", lambda: HybridGE(model(), objective, coordinates=[3]), TypeError, "a list of them or a mask, got int"),
    (
        "bad mask",
        lambda: HybridGE(model(), objective, coordinates={"0.weight": ones(5, 4)}),
        MaskError,
        r"mask\['0\.weight'\] must have the parameter's shape",
    ),
    ("decay", lambda: StaleGE(model(), objective, decay=1.5), ValueError, r"decay must be between 0 .*, got 1\.5"),
    ("decay nan", lambda: StaleGE(model(), objective, decay=float("nan")), ValueError, "decay must be between 0"),
    ("rge scheme", lambda: RGE(model(), objective, scheme="antithetic"), ValueError, "one of 'forward', 'central'"),
    ("model", lambda: CGE(objective, objective), TypeError, "model must be a torch.nn.Module, got function"),
    ("objective", lambda: CGE(model(), 3), TypeError, "objective must be callable as objective"),
    ("samples", lambda: check(model(), objective, batch(), samples=0), ValueError, "samples must be at least 1, got 0"),
]


@pytest.mark.parametrize(("make", "kind", "text"), [a[1:] for a in ARGUMENTS], ids=[a[0] for a in ARGUMENTS])
def test_arguments(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make()


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_is_never_overshot(kind: Any) -> None:
    estimator = kind(model(), objective, budget=400)
    while True:
        before = estimator.queries
        try:
            spent = estimator.estimate(batch()).queries
        except BudgetError as error:
            assert f"of the budget of 400 are spent: {400 - before:,} are left" in str(error)
            break
        assert estimator.queries == before + spent
    assert 0 < estimator.queries <= 400
    assert estimator.queries + spent > 400


def test_query_counts() -> None:
    mask = {"0.weight": ones(4, 5), "0.bias": ones(4)}
    assert CGE(model(), objective).estimate(batch(), mask).queries == 1 + 24
    assert CGE(model(), objective, scheme="central").estimate(batch(), mask).queries == 1 + 48
    assert RGE(model(), objective, queries=7).estimate(batch(), mask).queries == 1 + 7
    assert RGE(model(), objective, queries=7, scheme="central").estimate(batch(), mask).queries == 1 + 14
    hybrid = HybridGE(model(), objective, coordinates="0.bias", queries=7)
    assert hybrid.estimate(batch(), mask).queries == 1 + 4 + 7
    assert hybrid.estimate(batch(), {"0.bias": mask["0.bias"]}).queries == 1 + 4
    assert hybrid.estimate(batch(), {"0.weight": mask["0.weight"]}).queries == 1 + 7
    assert HybridGE(model(), objective, queries=7, scheme="central").estimate(batch(), mask).queries == 1 + 2 * (4 + 7)
    assert StaleGE(model(), objective).estimate(batch(), mask).queries == 1 + 24
    layerwise = LayerwiseRGE(model(), objective, queries=7)  # two directions for each of three layers
    assert layerwise.estimate(batch()).queries == 1 + 6
    assert layerwise.estimate(batch(), mask).queries == 1 + 4
    assert ForwardGE(model(), objective, queries=7).estimate(batch(), mask).queries == 7


class NoRule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.1, 0.9, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0e(x * self.weight)


def test_strict_names_the_op() -> None:
    with pytest.raises(NoRuleError, match=r"special_i0e\.default has no difference rule and strict=True forbids"):
        CGE(NoRule(), lambda m, b: m(b).sum(), strict=True).estimate(torch.ones(3, 5))


def test_a_random_op_that_reads_a_parameter_is_refused() -> None:
    class Sampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.poisson(self.weight.exp()) * x

    with pytest.raises(NoRuleError, match="draws random numbers whose distribution depends on a parameter"):
        CGE(Sampling(), lambda m, b: m(b).sum()).estimate(torch.ones(3, 5))


def test_steps_that_the_query_dtype_cannot_hold() -> None:
    for mu in (1e-46, 1e39):
        with pytest.raises(StepError, match=r"which is no step\. Use one between"):
            CGE(model(), objective, mu=mu)


def test_a_mask_is_a_dict() -> None:
    with pytest.raises(MaskError, match="a mask is a dict of parameter name -> bool tensor, got Tensor"):
        CGE(model(), objective).estimate(batch(), ones(4, 5))


@pytest.mark.parametrize("kind", [CGE, RGE])
def test_a_query_that_is_not_finite_is_named(kind: Any) -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.full((3,), 1e-3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.p.log() * x).sum()

    where = r"with p\[0\] moved by" if kind is CGE else "along a random direction with mu"
    estimator = kind(Log(), lambda m, b: m(b), mu=1.0, **({"scheme": "central"} if kind is CGE else {}))
    with pytest.raises(ObjectiveError, match=where):
        estimator.estimate(torch.ones(3))


def test_a_budget_and_a_seed_are_whole_numbers() -> None:
    with pytest.raises(ValueError, match="budget must be a number of queries or None, got '5'"):
        CGE(model(), objective, budget="5")
    with pytest.raises(ValueError, match=r"seed must be a whole number, got 1\.5"):
        RGE(model(), objective, seed=1.5)


def test_a_backend_that_does_not_exist_is_named_before_any_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DZ_BACKEND", "gpu")
    with pytest.raises(ValueError, match="DZ_BACKEND must be one of cuda, triton, cpu, reference, got 'gpu'"):
        CGE(model(), objective).estimate(batch())
