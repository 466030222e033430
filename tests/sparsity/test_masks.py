"""Mask policies: exact counts, draws decided by seed and step alone, and errors."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from deepzero import CGE
from deepzero.errors import MaskError
from deepzero.sparsity import (
    CostAware,
    Fixed,
    LayerRatios,
    LayerwiseRandom,
    Schedule,
    UniformRandom,
    parameter_names,
    prune,
)
from deepzero.sparsity.masks import allocate


def network():
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    model[2].bias.requires_grad_(False)
    return model  # 35 + 5 + 15 coordinates with requires_grad


def layerwise(every=1, seed=0):
    return LayerwiseRandom(LayerRatios.of(network(), {"0.weight": 0.8, "2.weight": 0.4}), every, seed)


def uniform(every=1, seed=0):
    return UniformRandom(network(), 0.9, every, seed)


COSTS = {"0.weight": 16.0, "0.bias": 9.0, "2.weight": 1.0}


def cost_aware(every=1, seed=0, **options):
    return CostAware(network(), 0.5, COSTS, every=every, seed=seed, **options)


def counts(mask):
    return {name: int(m.sum()) for name, m in mask.items()}


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
    # binomial with p = 5/55 (0.1 of 55 is just below 5.5 in float64): six standard deviations
    assert (counts - 4000 * 5 / 55).abs().max() < 6 * (4000 * 5 / 55 * 50 / 55) ** 0.5


def test_layerwise_counts_are_exact_in_every_parameter():
    for step in range(20):
        assert counts(layerwise().sample(step)) == {"0.weight": 7, "0.bias": 5, "2.weight": 9}


@pytest.mark.parametrize("make", [uniform, layerwise, cost_aware])
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
        target.sample(2)  # what was drawn before must not be given again
        target.load_state_dict(source.state_dict())
        assert same(source.sample(5), target.sample(5))

    def test_refuse_what_they_cannot_draw(self, make):
        with pytest.raises(MaskError, match="k >= 1, got every=0"):
            make(every=0)
        with pytest.raises(MaskError, match="whole number >= 0, got -1"):
            make(seed=-1)


def test_a_draw_is_the_same_on_every_machine():
    """Any number of workers draws these very coordinates, in this version of deepzero and in later ones."""
    flat = torch.cat([m.flatten() for m in UniformRandom(network(), 0.9, seed=3).sample(7).values()])
    assert flat.nonzero().flatten().tolist() == [11, 27, 32, 35, 51]


class TestAlwaysOn:
    NAMES = ("0.bias",)

    def test_uniform_counts_are_exact_over_the_others(self):
        policy = UniformRandom(network(), 0.9, always_on=self.NAMES)
        for step in range(10):
            mask = policy.sample(step)
            assert bool(mask.pop("0.bias").all())
            assert sum(counts(mask).values()) == round(0.1 * 50)

    def test_layerwise_counts_are_exact_in_the_others(self):
        ratios = LayerRatios.of(network(), {"0.weight": 0.8, "0.bias": 0.8, "2.weight": 0.4})
        assert counts(LayerwiseRandom(ratios).sample(0)) == {"0.weight": 7, "0.bias": 1, "2.weight": 9}
        found = LayerwiseRandom(ratios, always_on=self.NAMES).sample(0)
        assert counts(found) == {"0.weight": 7, "0.bias": 5, "2.weight": 9}

    def test_cost_aware_counts_are_exact_over_the_others(self):
        found = counts(cost_aware(always_on=self.NAMES).sample(0))
        assert found.pop("0.bias") == 5
        assert sum(found.values()) == 25

    def test_is_part_of_the_state(self):
        source, target = UniformRandom(network(), 0.9, always_on=self.NAMES), uniform()
        target.load_state_dict(source.state_dict())
        assert same(source.sample(2), target.sample(2))

    def test_unknown_names_and_nothing_left_are_refused(self):
        with pytest.raises(MaskError, match=r"always_on names 'bias', which is no parameter.*parameter_names"):
            UniformRandom(network(), 0.5, always_on=["bias"])
        with pytest.raises(MaskError, match="names every parameter, which leaves nothing to draw"):
            UniformRandom(network(), 0.5, always_on=["0.weight", "0.bias", "2.weight"])


class OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def test_parameter_names_by_group_and_pattern():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), OwnNorm(), nn.LayerNorm(3, bias=False))
    assert parameter_names(model, "norm") == ("1.weight", "1.bias", "2.scale", "3.weight")
    assert parameter_names(model, "bias") == ("0.bias", "1.bias")
    assert parameter_names(model, "bias", "3.*", "norm") == ("0.bias", "1.weight", "1.bias", "2.scale", "3.weight")
    assert parameter_names(model) == ()
    assert parameter_names(nn.Linear(2, 2, bias=False), "norm", "bias") == ()
    model[0].bias.requires_grad_(False)
    assert parameter_names(model, "bias") == ("1.bias",)
    with pytest.raises(MaskError, match=r"'2.scal' matches no parameter .* Did you mean '2.scale'\?"):
        parameter_names(model, "2.scal")
    with pytest.raises(MaskError, match=r"'zzz' matches no parameter .* Parameters are: 0.weight, 1.weight"):
        parameter_names(model, "zzz")


class TestSchedules:
    SCHEDULE = Schedule("linear", 0.0, 0.8, steps=8)

    @pytest.mark.parametrize("always_on", [(), ("0.bias",)])
    def test_uniform_counts_follow_at_the_first_step_of_each_draw(self, always_on):
        policy = UniformRandom(network(), self.SCHEDULE, every=2, always_on=always_on)
        drawn = 55 - 5 * len(always_on)
        for step in range(12):
            sparsity = min(0.8, 0.1 * (step - step % 2))
            assert sum(counts(policy.sample(step)).values()) == round((1 - sparsity) * drawn) + 5 * len(always_on)

    def test_layerwise_counts_end_at_the_ratios(self):
        """0.8 of 35 and 0.4 of 15 leave 16 of 50: a sparsity of 0.68, at which the ratios themselves hold."""
        ratios = LayerRatios.of(network(), {"0.weight": 0.8, "2.weight": 0.4})
        policy = LayerwiseRandom(ratios, sparsity=Schedule("linear", 0.0, 0.68, steps=10))
        totals = []
        for step in range(12):
            found = counts(policy.sample(step))
            assert found["0.bias"] == 5  # its ratio is 0
            totals.append(sum(found.values()) - 5)
        assert totals == [round((1 - min(0.68, 0.068 * step)) * 50) for step in range(12)]
        assert found == {"0.weight": 7, "0.bias": 5, "2.weight": 9}

    def test_cost_aware_follows(self):
        policy = CostAware(network(), self.SCHEDULE, COSTS)
        assert [sum(counts(policy.sample(step)).values()) for step in (0, 4, 8)] == [55, 33, 11]

    def test_states_carry_them(self):
        for make in (
            lambda sparsity: UniformRandom(network(), sparsity),
            lambda sparsity: LayerwiseRandom(LayerRatios.of(network(), {"0.weight": 0.5}), sparsity=sparsity),
            lambda sparsity: CostAware(network(), sparsity, COSTS),
        ):
            source, target = make(self.SCHEDULE), make(0.3)
            target.load_state_dict(source.state_dict())
            assert same(source.sample(5), target.sample(5))
            assert sum(counts(source.sample(5)).values()) != sum(counts(make(0.3).sample(5)).values())

    def test_the_sparsest_point_is_checked_at_once(self):
        with pytest.raises(MaskError, match=r"sparsity=0.995 leaves none of the model's 55 coordinates"):
            UniformRandom(network(), Schedule("cosine", 0.995, 0.5, 4))
        with pytest.raises(MaskError, match=r"a budget of 1, less than one coordinate of each of 3 parameters takes"):
            LayerwiseRandom(LayerRatios.of(network(), {}), sparsity=Schedule("linear", 0.0, 0.98, 4))


class TestCostAware:
    def test_counts_follow_one_over_the_root_of_the_cost(self):
        # n / sqrt(cost): 35/4, 5/3, 15; 27.5 rounds to 28; 2.weight would get more than all of its 15,
        # the other 13 are divided as 8.75 : 1.667, 10.92 and 2.08
        assert counts(cost_aware().sample(0)) == {"0.weight": 11, "0.bias": 2, "2.weight": 15}

    def test_without_exponent_costs_do_not_count(self):
        assert counts(cost_aware(exponent=0.0).sample(0)) == {"0.weight": 18, "0.bias": 2, "2.weight": 8}

    def test_ratios_are_what_costs_start_from(self):
        ratios = LayerRatios.of(network(), {"0.weight": 0.5, "2.weight": 0.9})
        found = counts(cost_aware(ratios=ratios).sample(0))
        # 17.5/4 to 1.5/1, of 25: 18.6 and 6.4; the ratio 0 of 0.bias keeps it whole
        assert found == {"0.weight": 19, "0.bias": 5, "2.weight": 6}

    def test_a_cost_budget_is_never_exceeded_and_used_up(self):
        policy = cost_aware(budget="cost")
        found = counts(policy.sample(0))
        budget = 0.5 * (35 * 16 + 5 * 9 + 15 * 1)
        spent = sum(COSTS[name] * count for name, count in found.items())
        assert spent <= budget
        unused = [COSTS[name] for name, size in (("0.weight", 35), ("0.bias", 5)) if found[name] < size]
        assert budget - spent < min(unused)
        assert found["2.weight"] == 15  # all of the cheapest

    def test_variance_is_least_at_the_root(self):
        """Sum of n^2 / k, the variance at equal gradients, for the same cost budget."""
        sizes, costs = {"a": 4000, "b": 4000, "c": 4000}, {"a": 30.0, "b": 6.0, "c": 1.0}

        def variance(exponent):
            weights = {name: sizes[name] * costs[name] ** -exponent for name in sizes}
            found = allocate(weights, sizes, 20_000.0, costs)
            return sum(sizes[name] ** 2 / count for name, count in found.items())

        assert variance(0.5) < min(variance(e) for e in (0.0, 0.25, 0.4, 0.6, 0.75, 1.0))

    def test_costs_from_a_plan(self):
        torch.manual_seed(0)
        model = network()
        plan = CGE(model, lambda m, b: m(b).square().mean()).plan(torch.randn(3, 7))
        policy = CostAware(model, 0.5, plan)
        assert policy.costs == {line.parameter: line.seconds for line in plan.lines}
        assert sum(counts(policy.sample(0)).values()) == 28

    def test_states_carry_costs_and_options(self):
        source, target = cost_aware(exponent=1.0, budget="cost"), CostAware(network(), 0.5, dict.fromkeys(COSTS, 1.0))
        target.load_state_dict(source.state_dict())
        assert same(source.sample(1), target.sample(1))

    @pytest.mark.parametrize("cost", [None, 0.0, -1.0, float("nan"), float("inf")])
    def test_unusable_costs_are_refused(self, cost):
        costs = {name: value for name, value in (COSTS | {"0.bias": cost}).items() if value is not None}
        with pytest.raises(MaskError, match=f"positive and finite, is needed for each .*that of '0.bias' is {cost}"):
            CostAware(network(), 0.5, costs)
        CostAware(network(), 0.5, costs, always_on=["0.bias"])  # needs none

    def test_unusable_options_are_refused(self):
        with pytest.raises(MaskError, match=r"the exponent of a cost is a finite number, 0\.5 is optimal, got nan"):
            cost_aware(exponent=float("nan"))
        with pytest.raises(MaskError, match="budget is one of 'queries', 'cost', got 'time'"):
            cost_aware(budget="time")

    def test_a_model_that_runs_whole_has_no_costs(self):
        from deepzero.estimators.profile import Plan

        with pytest.raises(MaskError, match=r"because the model runs whole: it cannot be captured\. .*UniformRandom"):
            CostAware(network(), 0.5, Plan([], 4, "float32", "it cannot be captured."))


def test_allocations_are_exact_whatever_the_weights():
    generator = random.Random(0)
    for _ in range(200):
        sizes = {str(k): generator.choice([1, 2, 7, 30, 900]) for k in range(generator.randint(1, 9))}
        weights = {name: 10 ** generator.uniform(-8, 8) for name in sizes}
        total = generator.randint(len(sizes), sum(sizes.values()))
        found = allocate(weights, sizes, total)
        assert sum(found.values()) == total
        assert all(1 <= found[name] <= size for name, size in sizes.items())
        costs = {name: 10 ** generator.uniform(-3, 3) for name in sizes}
        budget = generator.uniform(sum(costs.values()), sum(costs[name] * size for name, size in sizes.items()))
        found = allocate(weights, sizes, budget, costs)
        spent = sum(costs[name] * count for name, count in found.items())
        assert all(1 <= found[name] <= size for name, size in sizes.items())
        # a sum of at most nine products, each rounded once, and as many additions
        assert spent <= budget * (1 + 20 * 2**-53)
        assert all(
            found[name] == size or spent + costs[name] > budget * (1 - 20 * 2**-53) for name, size in sizes.items()
        )


def test_prune_zeroes_what_the_mask_leaves_out():
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask = layerwise().sample(0)
    prune(model, mask)
    for name, parameter in model.named_parameters():
        if name in mask:
            assert torch.equal(parameter, torch.where(mask[name], before[name], 0.0))
        else:
            assert torch.equal(parameter, before[name])  # frozen


@pytest.mark.parametrize("empty", [{}, {"0.bias": torch.zeros(5, dtype=torch.bool)}])
def test_prune_leaves_no_parameter_without_weights(empty):
    model = network()
    before = model[0].weight.detach().clone()
    mask = {name: m for name, m in layerwise().sample(0).items() if name != "0.bias"} | empty
    with pytest.raises(MaskError, match=r"the mask prunes all 5 coordinates of '0\.bias': nothing would pass"):
        prune(model, mask)
    assert torch.equal(model[0].weight, before)


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
