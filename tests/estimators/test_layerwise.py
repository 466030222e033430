"""LayerwiseRGE is RGE in every layer apart, bit for bit, from one base pass."""

from __future__ import annotations

import pytest
import torch

from deepzero.estimators import RGE, LayerwiseRGE, Mask
from deepzero.execute import planner
from deepzero.execute.probe import probe
from estimators.small import batch, network, objective, random_mask


def test_each_layer_is_rge_with_directions_of_its_own() -> None:
    model = network()
    ours = LayerwiseRGE(model, objective, queries=11, seed=5)
    assert [[model.get_parameter(name).dim() > 1 for name in names] for names in ours.layers[:-1]] == [[True]] * (
        len(ours.layers) - 1
    )
    assert len(ours.layers[-1]) > 1 and all(model.get_parameter(name).dim() < 2 for name in ours.layers[-1])
    each = 11 // len(ours.layers)
    for estimate in range(2):
        for mask in (None, random_mask(model, 0.5, seed=3)):
            ours.estimates = estimate
            got = ours.estimate(batch(), mask).grads
            for number, names in enumerate(ours.layers):
                one = RGE(model, objective, queries=each, seed=5)
                one.estimates = estimate * len(ours.layers) + number
                part: Mask = {
                    name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) if mask is None else mask[name]
                    for name in names
                }
                wanted = one.estimate(batch(), part).grads
                assert all(torch.equal(got[name], wanted[name]) for name in wanted)
                assert all(bool(grad.any()) for grad in wanted.values())
            assert len(got) == sum(map(len, ours.layers))


def test_every_layer_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, planned = network(), []
    monkeypatch.setattr(planner, "probe", lambda *args, **kwargs: planned.append(args) or probe(*args, **kwargs))
    ours = LayerwiseRGE(model, objective, queries=12)
    for _ in range(3):
        ours.estimate(batch())
    assert 0 < len(planned) <= len(ours.layers)


def test_plans_of_more_sets_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "MAX_JOINT", 2)
    model = network()
    few, many = LayerwiseRGE(model, objective, queries=24), LayerwiseRGE(model, objective, queries=24)
    assert len(few.layers) > 2
    first = few.estimate(batch()).grads
    known = few.engine.planner._joint
    assert all(len(sets) == 2 for sets in known.values())
    monkeypatch.undo()
    wanted = many.estimate(batch()).grads
    assert all(torch.equal(first[name], wanted[name]) for name in wanted)


def test_a_layer_outside_of_the_mask_makes_no_query() -> None:
    model = network()
    ours = LayerwiseRGE(model, objective, queries=12)
    name = ours.layers[0][0]
    found = ours.estimate(batch(), {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool)})
    assert found.queries == 1 + 12 // len(ours.layers)
    assert list(found.grads) == [name]
