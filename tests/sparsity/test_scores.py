"""Every score against float64 autograd, reproducible from the seed, and the model untouched."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero import sparsity
from deepzero.errors import ObjectiveError, StepError
from deepzero.estimators import CGE
from deepzero.sparsity import SCORES, layer_ratios
from untouched import assert_same, snapshot

ZEROTH_ORDER = [name for name in SCORES if name.startswith("zo_")]
SAMPLED = [name for name in ZEROTH_ORDER if not name.endswith("_cge")]
DATA_FREE = ["magnitude", "random", "uniform", "erk", "data_free"]


def network(seed: int = 0) -> nn.Module:
    """Smooth, so that finite differences and derivatives may be compared; 219 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )


def objective(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, 1, 4, 4, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(0, 3, (12,), generator=generator)


def flat(scores: sparsity.Scores) -> Tensor:
    return torch.cat([v.double().flatten() for v in scores.values.values()])


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])


def hessian_gradient(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """(g, H g) from the whole Hessian, in float64: nothing shared with the code under test."""
    twin = copy.deepcopy(model).double()
    names = [name for name, _ in twin.named_parameters()]
    sizes = [p.numel() for p in twin.parameters()]
    buffers = {name: b.clone() for name, b in twin.named_buffers()}

    def loss(vector: Tensor) -> Tensor:
        parts = [v.view(p.shape) for v, p in zip(vector.split(sizes), twin.parameters(), strict=True)]
        values = dict(zip(names, parts, strict=True)) | {name: b.clone() for name, b in buffers.items()}
        return F.cross_entropy(torch.func.functional_call(twin, values, (data[0].double(),)), data[1])

    theta = torch.cat([p.detach().flatten() for p in twin.parameters()])
    product = torch.autograd.functional.hessian(loss, theta) @ torch.autograd.functional.jacobian(loss, theta)
    return {n: v.view(p.shape) for n, v, p in zip(names, product.split(sizes), twin.parameters(), strict=True)}


def test_first_order_grasp_is_the_hessian_gradient_product() -> None:
    model = network().double()
    found = sparsity.grasp(model, objective, batch(torch.float64))
    wanted = hessian_gradient(model, batch(torch.float64))
    for name, p in model.named_parameters():
        torch.testing.assert_close(found.values[name], -p.detach() * wanted[name], rtol=1e-9, atol=1e-11)


def test_zo_grasp_cge_orders_coordinates_as_the_hessian_does() -> None:
    model = network()
    found = sparsity.zo_grasp_cge(model, objective, batch())
    exact = hessian_gradient(model, batch())
    wanted = torch.cat([(-p.detach().double() * exact[name]).flatten() for name, p in model.named_parameters()])
    assert rank_correlation(flat(found), wanted) >= 0.99
    assert rank_correlation(flat(found).abs(), wanted.abs()) >= 0.99
    assert found.queries == 2 * (sum(p.numel() for p in model.parameters()) + 1)


def test_zo_grasp_cge_converges_with_the_step() -> None:
    """The error is O(mu): a tenth of the step leaves about a tenth of it, until float64 rounding."""
    model = network().double()
    wanted = flat(sparsity.grasp(model, objective, batch(torch.float64)))
    data = batch(torch.float64)
    errors = [
        float((flat(sparsity.zo_grasp_cge(model, objective, data, mu=mu, precision="float64")) - wanted).norm())
        for mu in (1e-2, 1e-3, 1e-4)
    ]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.2)


def test_snip_is_weight_times_gradient() -> None:
    model = network().double()
    data = batch(torch.float64)
    twin = copy.deepcopy(model)
    objective(twin, data).backward()
    wanted = torch.cat([(p * p.grad).abs().detach().flatten() for p in twin.parameters()])
    torch.testing.assert_close(flat(sparsity.snip(model, objective, data)), wanted, rtol=1e-12, atol=1e-15)
    exact = flat(sparsity.zo_snip_cge(model, objective, data, mu=1e-6, precision="float64"))
    assert float((exact - wanted).norm() / wanted.norm()) < 1e-5


def test_synflow_is_the_path_norm_and_exact_by_differences() -> None:
    """For a two-layer network R = sum over paths of |v| |w|, so that a layer's scores add up to R (Tanaka et al.)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    data = (torch.randn(7, 5), torch.zeros(7))
    w, v = (m.weight.detach().double().abs() for m in (model[0], model[2]))
    first = sparsity.synflow(model, None, data)
    torch.testing.assert_close(first.values["0.weight"], w * v.sum(0)[:, None], rtol=1e-12, atol=0)
    torch.testing.assert_close(first.values["2.weight"], v * w.sum(1), rtol=1e-12, atol=0)
    exact = sparsity.zo_synflow_cge(model, None, data)
    # R is linear in every weight, so the only error is rounding of the quotient
    torch.testing.assert_close(flat(exact), flat(first), rtol=1e-11, atol=0)


@pytest.mark.parametrize(("sampled", "exact"), [("zo_grasp", "grasp"), ("zo_grasp_layerwise", "grasp")])
def test_random_directions_are_unbiased_in_scale(sampled: str, exact: str) -> None:
    """With q far above d the estimate of H g approaches the product itself, not a multiple of it."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    data = (torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(9) % 2)
    wanted = flat(SCORES[exact](model, objective, data))
    q = 4000
    found = flat(SCORES[sampled](model, objective, data, queries=q, mu=1e-5, precision="float64"))
    slope = float(found @ wanted / (wanted @ wanted))
    # the mean of m products has relative deviation sqrt(d / m) in g and again in H g: five of them, one layer's m
    each = q if sampled == "zo_grasp" else q // 3  # two weights, and the biases
    assert abs(slope - 1) < 5 * (2 * len(wanted) / each) ** 0.5


def test_layerwise_norms_are_those_of_the_product() -> None:
    """With few directions in many dimensions the mean square of the product in a layer is right nevertheless."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.sign() * 0.15)  # equal magnitudes: scores have the norms of H g
    data = (torch.randn(16, 40).double(), torch.arange(16) % 5)
    true = sparsity.snip(model, objective, data).values
    q = 300
    found = sparsity.zo_snip_layerwise(model, objective, data, queries=q, mu=1e-6, precision="float64").values
    for name in ("0.weight", "2.weight"):
        # a chi-squared mean over the q / 3 directions of a layer: relative deviation sqrt(2 m) / m, five of them;
        # the plain mean of m products would be 1 + 800 / m = 9 times too large
        wanted = float(true[name].square().sum())
        assert float(found[name].square().sum()) == pytest.approx(wanted, rel=5 * (2 * 3 / q) ** 0.5)


def test_layerwise_sees_what_the_published_one_does_not() -> None:
    """Two equal layers of which one hardly matters: 192 directions over all layers cannot tell, per layer they can."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(60, 60, bias=False), nn.Linear(60, 60, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.a(x)) + 0.01 * torch.tanh(self.b(x))

    model = Two()
    data = (torch.randn(16, 60, generator=torch.Generator().manual_seed(0)), torch.arange(16))
    pruned = {
        score.__name__: layer_ratios(score(model, objective, data), 0.5).pruned
        for score in (sparsity.grasp, sparsity.zo_grasp, sparsity.zo_grasp_layerwise)
    }
    assert pruned["grasp"]["b.weight"] - pruned["grasp"]["a.weight"] > 0.8
    assert pruned["zo_grasp_layerwise"]["b.weight"] - pruned["zo_grasp_layerwise"]["a.weight"] > 0.8
    assert abs(pruned["zo_grasp"]["b.weight"] - pruned["zo_grasp"]["a.weight"]) < 0.2


def test_data_free_is_what_its_formula_says() -> None:
    model = network()
    values = sparsity.data_free(model, seed=3).values
    z = {n: values[n] * p.numel() ** 0.5 / p.detach().double().abs() for n, p in model.named_parameters() if p.all()}
    z_all = torch.cat([v.flatten() for v in z.values()])
    # |z| of a standard normal: mean sqrt(2 / pi), deviation sqrt(1 - 2 / pi), five of them
    assert float(z_all.mean()) == pytest.approx((2 / torch.pi) ** 0.5, abs=5 * ((1 - 2 / torch.pi) / len(z_all)) ** 0.5)
    assert torch.equal(sparsity.magnitude(model).values["5.weight"], model[5].weight.detach().double().abs())


@pytest.mark.parametrize("name", SCORES)
class TestEveryScore:
    def test_depends_on_its_seed_alone_and_touches_nothing(self, name: str) -> None:
        found = []
        for state in range(2):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2), nn.Linear(2, 2))
            model[4].eval()
            model[4].weight.requires_grad_(False)
            model[0].weight.grad = torch.ones_like(model[0].weight)
            data = (torch.randn(6, 4), torch.arange(6) % 2)
            random.seed(state), np.random.seed(state)
            if name in DATA_FREE or "synflow" in name:  # the others draw a dropout mask
                torch.manual_seed(state)
            before = snapshot(model)
            scores = SCORES[name](model, objective, data)
            assert_same(before, snapshot(model))
            trainable = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
            assert [(n, v.shape) for n, v in scores.values.items()] == list(trainable.items())
            assert all(bool(v.isfinite().all()) and not v.requires_grad for v in scores.values.values())
            assert (scores.queries == 0) == (name in DATA_FREE)
            found.append(flat(scores))
        assert torch.equal(*found)
        if name in SAMPLED or name in ("random", "uniform", "erk", "data_free"):
            assert not torch.equal(found[0], flat(SCORES[name](model, objective, data, seed=1)))

    def test_an_exception_leaves_nothing_behind(self, name: str) -> None:
        if name in DATA_FREE:
            return  # never calls the model

        class Failing(nn.Linear):
            def __init__(self) -> None:
                super().__init__(4, 2)
                self.register_buffer("count", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                self.count += 1
                torch.rand(())
                raise RuntimeError("the simulator is down")

        model = Failing()
        before = snapshot(model)
        with pytest.raises(RuntimeError, match="the simulator is down"):
            SCORES[name](model, objective, (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)))
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("name", SAMPLED)
def test_no_queries_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"queries must be .*, got 0"):
        SCORES[name](network(), objective, batch(), queries=0)


@pytest.mark.parametrize("name", ["zo_grasp_layerwise", "zo_snip_layerwise"])
def test_fewer_queries_than_layers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least one direction for each of the model's 4 layers, got 3"):
        SCORES[name](network(), objective, batch(), queries=3)


def test_bad_steps_and_seeds_are_refused() -> None:
    with pytest.raises(StepError, match="mu must be a positive finite step"):
        sparsity.zo_grasp(network(), objective, batch(), mu=0.0)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        sparsity.zo_grasp_layerwise(network(), objective, batch(), seed=0.5)


@pytest.mark.parametrize("score", [sparsity.synflow, sparsity.zo_synflow, sparsity.zo_synflow_cge])
def test_synflow_needs_a_floating_input(score: Any) -> None:
    with pytest.raises(ObjectiveError, match=r"this batch has none\. Use another score"):
        score(nn.Embedding(3, 2), objective, torch.zeros(4, dtype=torch.int64))


def test_the_engine_estimates_at_other_weights_and_then_at_the_models_own() -> None:
    model = network().double()
    estimator = CGE(model, objective, precision="float64")
    data = batch(torch.float64)
    own = estimator.estimate(data)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.1)
    with estimator.engine.at(dict(moved.named_parameters())):
        there = estimator.estimate(data)
    wanted = CGE(moved, objective, precision="float64").estimate(data)
    assert there.loss == wanted.loss != own.loss
    assert all(torch.equal(there.grads[n], wanted.grads[n]) for n in wanted.grads)
    again = estimator.estimate(data)
    assert again.loss == own.loss
    assert all(torch.equal(again.grads[n], own.grads[n]) for n in own.grads)


def test_a_model_that_runs_whole_is_scored_too() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.sum()) < 1e6 else x

    torch.manual_seed(0)
    model = Branching()
    data = (torch.randn(6, 3), torch.arange(6) % 2)
    for score in (sparsity.zo_grasp, sparsity.zo_grasp_layerwise, sparsity.zo_grasp_cge):
        with pytest.warns(UserWarning, match="runs whole"):
            whole = flat(score(model, objective, data))
        captured = flat(score(model.inner, objective, data))
        # rounding of float32 gradients, divided by mu, against scores of about the gradient's size
        assert float((whole - captured).norm() / captured.norm()) < 1e-3
