"""LayerwiseRGE is RGE in every layer apart, bit for bit, from one base pass."""

from __future__ import annotations

import torch

from deepzero.estimators import RGE, LayerwiseRGE, Mask
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


def test_a_layer_outside_of_the_mask_makes_no_query() -> None:
    model = network()
    ours = LayerwiseRGE(model, objective, queries=12)
    name = ours.layers[0][0]
    found = ours.estimate(batch(), {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool)})
    assert found.queries == 1 + 12 // len(ours.layers)
    assert list(found.grads) == [name]
