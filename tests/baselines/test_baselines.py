"""PlainLoop and Backprop: right quotients, exact masks, and nothing touched whatever happens."""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepzero.baselines import Backprop, PlainLoop
from deepzero.errors import BudgetError, MaskError, ObjectiveError, StepError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(2 * 4 * 4, 3)
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(5, 1, 6, 6, generator=g), torch.randint(3, (5,), generator=g)


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def everything(model: nn.Module) -> list:
    """Bits of weights, buffers, gradients and random state, comparable with ==."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return [
        [t.detach().numpy().tobytes() for t in tensors],
        [m.training for m in model.modules()],
        torch.get_rng_state().numpy().tobytes(),
        [np.asarray(part).tobytes() for part in np.random.get_state()],
        random.getstate(),
    ]


ESTIMATORS = {
    "forward": lambda model, objective: PlainLoop(model, objective, mu=1e-2),
    "central": lambda model, objective: PlainLoop(model, objective, mu=1e-2, scheme="central"),
    "backprop": Backprop,
}
METHODS = ["estimate", "backward"]


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_plain_loop_is_the_quotient_written_out(scheme):
    model = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    found = PlainLoop(model, lambda m, b: m(b).pow(3).mean(), mu=1e-2, scheme=scheme).estimate(x)

    with torch.no_grad():
        weights = [model.weight.clone(), model.bias.clone()]

        def loss(k, at, step):
            moved = [w.clone() for w in weights]
            moved[k][at] += step
            return float(F.linear(x, *moved).pow(3).mean())

        for k, name in enumerate(["weight", "bias"]):
            for at in np.ndindex(*weights[k].shape):
                down, width = (loss(0, (0, 0), 0.0), 1e-2) if scheme == "forward" else (loss(k, at, -1e-2), 2e-2)
                assert float(found.grads[name][at]) == pytest.approx((loss(k, at, 1e-2) - down) / width, rel=1e-10)
    assert found.queries == (9 if scheme == "forward" else 17)


def test_central_differences_of_a_square_equal_the_gradient():
    model = nn.Linear(2, 1).double()

    def objective(m, b):
        return m(b).pow(2).mean()

    x = torch.randn(4, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    ours, exact = (
        PlainLoop(model, objective, mu=0.1, scheme="central").estimate(x),
        Backprop(model, objective).estimate(x),
    )
    for name in ("weight", "bias"):
        torch.testing.assert_close(ours.grads[name], exact.grads[name], rtol=1e-10, atol=0)


def test_the_realised_step_is_the_divisor():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    found = PlainLoop(model, lambda m, b: m.weight.double().sum(), mu=5e-3).estimate(None)
    assert float(found.grads["weight"]) == 1.0  # 1 + 5e-3 is 1.0078125 in bfloat16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
class TestNothingMoves:
    def test_or_exactly_as_one_forward_pass(self, make, method):
        model, twin, data = network(), network(), batch()
        torch.manual_seed(3)
        cross_entropy(twin, data)
        expected = everything(twin)
        torch.manual_seed(3)
        before = everything(model)
        getattr(make(model, cross_entropy), method)(data)
        for p in model.parameters():
            p.grad = None
        assert everything(model) == (before if method == "estimate" else expected)

    def test_after_an_exception(self, make, method):
        model, data = network(), batch()
        calls = 0

        def failing(m, b):
            nonlocal calls
            calls += 1
            loss = cross_entropy(m, b)
            np.random.rand(), random.random()
            if calls == (1 if make is Backprop else 7):
                raise ZeroDivisionError
            return loss

        before = everything(model)
        estimator = make(model, failing)
        with pytest.raises(ZeroDivisionError):
            getattr(estimator, method)(data)
        assert everything(model) == before
        assert estimator.queries == 0

    def test_after_ctrl_c(self, make, method):
        model, data = network(), batch()
        calls = 0

        def interrupted(m, b):
            nonlocal calls
            calls += 1
            loss = cross_entropy(m, b)
            if calls == (1 if make is Backprop else 9):
                os.kill(os.getpid(), signal.SIGINT)
            return loss

        before, handler = everything(model), signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            getattr(make(model, interrupted), method)(data)
        assert everything(model) == before
        assert signal.getsignal(signal.SIGINT) is handler

    def test_a_handler_that_goes_on_is_called_and_changes_nothing(self, make, method):
        model, data, heard = network(), batch(), []

        def noisy(m, b):
            os.kill(os.getpid(), signal.SIGINT)
            return cross_entropy(m, b)

        expected = getattr(make(network(), cross_entropy), method)(data)
        old = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
        try:
            found = getattr(make(model, noisy), method)(data)
        finally:
            signal.signal(signal.SIGINT, old)
        assert len(heard) == (1 if make is Backprop else found.queries)
        assert found.queries == expected.queries


def test_an_interrupt_while_weights_are_written_waits_and_then_strikes():
    from deepzero.baselines.transaction import Transaction

    model = network()
    before = everything(model)

    def interrupted():
        with Transaction(model) as transaction, torch.no_grad():
            os.kill(os.getpid(), signal.SIGINT)
            transaction.move(model[0].weight, (0, 0, 0, 0), torch.tensor(7.0))
            assert model[0].weight[0, 0, 0, 0] == 7.0
            transaction.settle()
            pytest.fail("the interrupt was lost")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert everything(model) == before


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_masked_entries_are_exactly_zero_and_the_rest_is_unchanged(make):
    model, data = network(), batch()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    full = make(model, cross_entropy).estimate(data).grads
    torch.set_rng_state(state)
    mask = {
        "0.weight": torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(2)) < 0.5,
        "5.bias": torch.zeros(3, dtype=torch.bool),
    }
    assert 0 < int(mask["0.weight"].sum()) < 18
    found = make(model, cross_entropy).estimate(data, mask)
    assert set(found.grads) == {"0.weight"}
    assert torch.equal(found.grads["0.weight"], torch.where(mask["0.weight"], full["0.weight"], 0))


def test_backward_adds_to_existing_gradients():
    model, data = nn.Linear(2, 1), torch.ones(1, 2)
    for _ in range(2):
        Backprop(model, lambda m, b: m(b).sum()).backward(data)
    assert torch.equal(model.weight.grad, torch.full((1, 2), 2.0))


def test_backprop_gives_zero_where_no_gradient_flows():
    model = nn.Linear(2, 1)
    found = Backprop(model, lambda m, b: torch.sign(m(b)).sum().detach()).estimate(torch.ones(1, 2))
    assert torch.equal(found.grads["weight"], torch.zeros(1, 2))


def test_a_budget_is_never_overshot_and_its_state_survives():
    model, data = network(), batch()
    estimator = PlainLoop(model, cross_entropy, mu=1e-2, budget=200)
    mask = {"5.weight": torch.ones(3, 32, dtype=torch.bool)}
    estimator.backward(data, mask)
    twin = PlainLoop(model, cross_entropy, mu=1e-2, budget=200)
    twin.load_state_dict(estimator.state_dict())
    twin.backward(data, mask)
    before = everything(model)
    with pytest.raises(
        BudgetError, match="this estimate needs 97 queries and 194 of the budget of 200 are spent: 6 are left"
    ):
        twin.backward(data, mask)
    assert everything(model) == before


BAD_MASKS = {
    "unknown": ({"0.wieght": torch.ones(2, 1, 3, 3).bool()}, r"names '0.wieght', which is no parameter.*'0.weight'"),
    "dtype": ({"0.weight": torch.ones(2, 1, 3, 3)}, r"must be a bool tensor, got torch.float32"),
    "not a tensor": ({"0.weight": [True]}, r"must be a bool tensor, got list"),
    "shape": ({"0.weight": torch.ones(2, 9).bool()}, r"shape \[2, 1, 3, 3\], got \[2, 9\]"),
    "frozen": (
        {"0.bias": torch.ones(2).bool()},
        r"names '0.bias', which cannot be estimated: it does not req",
    ),
    "empty": ({"0.weight": torch.zeros(2, 1, 3, 3).bool()}, r"the mask selects no coordinate"),
}


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize(("mask", "text"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_a_mask_that_does_not_fit_is_refused(make, mask, text):
    model = network()
    model[0].bias.requires_grad_(False)
    with pytest.raises(MaskError, match=text):
        make(model, cross_entropy).estimate(batch(), mask)


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize(
    ("objective", "text"),
    [
        (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), r"got a tensor of shape \[5\]"),
        (lambda m, b: 1.0, "got float"),
        (lambda m, b: cross_entropy(m, b) * float("nan"), "the loss is nan"),
        (lambda m, b: cross_entropy(m, b) + float("inf"), "the loss is inf"),
    ],
)
def test_a_loss_that_is_not_one_finite_number_is_refused(make, objective, text):
    model = network()
    before = everything(model)
    with pytest.raises(ObjectiveError, match=text):
        make(model, objective).backward(batch())
    assert everything(model) == before


def test_a_perturbed_loss_that_is_not_finite_names_its_coordinate():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ObjectiveError, match=r"the loss is inf with weight\[0, 1\] moved by 0.01"):
        PlainLoop(model, lambda m, b: torch.where(m.weight[0, 1] > 0, torch.inf, 1.0), mu=1e-2).estimate(None)


def test_unusable_steps_are_refused():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(2.0)
    with pytest.raises(StepError, match=r"the step 0.005 vanishes when added to weight\[0, 0\] = 2 in torch.bfloat16"):
        PlainLoop(model, lambda m, b: m.weight.sum(), mu=5e-3).estimate(None)
    assert model.weight.item() == 2.0
    for mu in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(StepError, match="mu must be a positive finite step"):
            PlainLoop(model, cross_entropy, mu=mu)
    with pytest.raises(ValueError, match="scheme must be one of 'forward', 'central', got 'both'"):
        PlainLoop(model, cross_entropy, scheme="both")
