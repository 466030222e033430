"""Common options stand once, and every signature shows them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import nn

from deepzero.estimators import CGE, ESTIMATORS, RGE, EngineEstimator, HybridGE
from deepzero.estimators.options import Options, RandomOptions, spelled_out
from deepzero.sparsity import SCORES

COMMON = {name: p for name, p in inspect.signature(CGE).parameters.items() if p.kind is p.KEYWORD_ONLY}


def test_the_typed_options_are_those_that_the_estimators_take() -> None:
    assert set(Options.__annotations__) == set(COMMON)
    taken = {name for name, p in inspect.signature(RGE).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(RandomOptions.__annotations__) == taken


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_signature_spells_its_options_out(name: str) -> None:
    parameters = inspect.signature(ESTIMATORS[name]).parameters
    assert list(parameters)[:2] == ["model", "objective"]
    assert {key: parameters[key] for key in COMMON} == COMMON
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())


def test_own_options_come_first_and_win() -> None:
    shown = list(inspect.signature(HybridGE).parameters)
    assert shown[2:6] == ["coordinates", "queries", "distribution", "seed"]

    class Mine(RGE):
        def __init__(self, model: nn.Module, objective: Any, *, mu: float = 1e-4, **options: Any) -> None:
            super().__init__(model, objective, mu=mu, **options)

    assert inspect.signature(Mine).parameters["mu"].default == 1e-4
    assert list(inspect.signature(Mine).parameters).count("mu") == 1

    class Closed(EngineEstimator):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model, len)

    assert list(inspect.signature(Closed).parameters) == ["model"]


@pytest.mark.parametrize(("score", "has", "has_not"), [
    ("zo_grasp", {"mu", "queries", "distribution", "precision", "block"}, set()),
    ("zo_snip_layerwise", {"mu", "queries", "seed", "precision"}, {"distribution"}),
    ("zo_synflow_cge", {"mu", "scheme"}, {"precision", "queries"}),
])  # fmt: skip
def test_a_score_shows_the_options_of_its_estimator(score: str, has: set[str], has_not: set[str]) -> None:
    shown = set(inspect.signature(SCORES[score]).parameters)
    assert has | {"model", "objective", "batch"} <= shown
    assert not shown & (has_not | {"options"})


def test_a_function_without_options_keeps_its_signature() -> None:
    def plain(model: nn.Module, *, mu: float = 1.0) -> None: ...

    assert spelled_out(plain, CGE) == inspect.signature(plain)
