"""Mask policies: exact counts, draws decided by seed and step alone, and errors."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from deepzero.errors import MaskError
from deepzero.sparsity import Fixed, LayerRatios, LayerwiseRandom, UniformRandom


def network():
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    model[2].bias.requires_grad_(False)
    return model  # 35 + 5 + 15 coordinates with requires_grad


def layerwise(every=1, seed=0):
    return LayerwiseRandom(LayerRatios.of(network(), {"0.weight": 0.8, "2.weight": 0.4}), every, seed)


def uniform(every=1, seed=0):
    return UniformRandom(network(), 0.9, every, seed)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.95])
def test_uniform_counts_are_exact_and_shapes_fit(sparsity):
    model = network()
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    for step in range(20):
        mask = UniformRandom(model, sparsity).sample(step)
        assert {name: m.shape for name, m in mask.items()} == shapes
        assert all(m.dtype == torch.bool for m in mask.values())
        assert sum(int(m.sum()) for m in mask.values()) == round((1 - sparsity) * 55)


def test_uniform_draws_are_uniform():
    policy = uniform()
    counts = sum(torch.cat([m.flatten() for m in policy.sample(s).values()]).double() for s in range(4000))
    # binomial with p = 6/55 (round(5.5) is 6): six standard deviations
    assert (counts - 4000 * 6 / 55).abs().max() < 6 * (4000 * 6 / 55 * 49 / 55) ** 0.5


def test_layerwise_counts_are_exact_in_every_parameter():
    for step in range(20):
        counts = {name: int(m.sum()) for name, m in layerwise().sample(step).items()}
        assert counts == {"0.weight": 7, "0.bias": 5, "2.weight": 9}


@pytest.mark.parametrize("make", [uniform, layerwise])
class TestDraws:
    def test_depend_on_seed_and_step_alone(self, make):
        first, second = make(), make()
        second.sample(11)
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        found = first.sample(3)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        state = torch.get_rng_state()
        assert same(found, second.sample(3))
        assert torch.equal(torch.get_rng_state(), state)
        assert not same(found, first.sample(4))
        assert not same(found, make(seed=1).sample(3))

    def test_stay_for_k_steps(self, make):
        policy = make(every=3)
        draws = [policy.sample(step) for step in range(6)]
        assert same(draws[0], draws[2])
        assert same(draws[3], draws[5])
        assert not same(draws[2], draws[3])

    def test_cannot_be_changed_from_outside(self, make):
        policy = make(every=2)
        policy.sample(0).clear()
        assert policy.sample(1)

    def test_survive_their_state(self, make):
        source, target = make(every=2, seed=9), make()
        target.load_state_dict(source.state_dict())
        assert same(source.sample(5), target.sample(5))


def test_states_carry_sparsity_and_ratios():
    target = UniformRandom(network(), 0.5)
    target.load_state_dict(uniform().state_dict())
    assert same(target.sample(0), uniform().sample(0))
    other = LayerwiseRandom(LayerRatios.of(network(), {}))
    other.load_state_dict(layerwise().state_dict())
    assert same(other.sample(0), layerwise().sample(0))


def test_fixed():
    mask = {"0.bias": torch.tensor([True, False, True, False, False])}
    policy, other = Fixed(mask), Fixed({})
    assert same(policy.sample(0), policy.sample(7))
    other.load_state_dict(policy.state_dict())
    assert same(other.sample(0), mask)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_fractions_outside_the_range_are_refused(sparsity):
    with pytest.raises(MaskError, match=f"sparsity must be the fraction left out, 0 <= fraction < 1, got {sparsity}"):
        UniformRandom(network(), sparsity)
    with pytest.raises(MaskError, match=f"the ratio of '0.bias' must be the fraction left out.*got {sparsity}"):
        LayerRatios.of(network(), {"0.bias": sparsity})


def test_errors_say_what_to_do():
    with pytest.raises(
        MaskError, match=r"sparsity=0.999 leaves none of the model's 55 coordinates .* at most 0.981818"
    ):
        UniformRandom(network(), 0.999)
    with pytest.raises(MaskError, match=r"leaves none of the model's 0 coordinates"):
        UniformRandom(nn.ReLU(), 0.5)
    with pytest.raises(
        MaskError, match=r"the ratio 0.95 prunes all 5 coordinates of '0.bias'.* at most 0.8, or freeze"
    ):
        LayerRatios.of(network(), {"0.bias": 0.95})
    with pytest.raises(MaskError, match=r"the ratios name '0.wight', which is no parameter.*Did you mean '0.weight'\?"):
        LayerRatios.of(network(), {"0.wight": 0.5})
    with pytest.raises(
        MaskError, match=r"the ratios name '2.bias', which is no parameter of the model with requires_grad"
    ):
        LayerRatios.of(network(), {"2.bias": 0.5})
    with pytest.raises(MaskError, match="k >= 1, got every=0"):
        UniformRandom(network(), 0.5, every=0)
