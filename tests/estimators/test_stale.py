"""StaleGE: the mask's coordinates are CGE's, the others are remembered, and only ``backward`` moves the memory."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from deepzero.errors import CheckpointError, ObjectiveError
from deepzero.estimators import CGE, StaleGE
from estimators.small import batch, network, objective, random_mask
from judge import FLOAT32, judge, plain_quotients


def descend(model: nn.Module) -> None:
    """One plain step, so that a stale value is no longer the value at the present weights."""
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.5 * p.grad
                p.grad = None


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_refreshed_where_selected_and_decayed_elsewhere(decay: float) -> None:
    """decay is a power of two or 0, so that the expected values are exact."""
    model = network()
    cge, estimator = CGE(model, objective), StaleGE(model, objective, decay=decay)
    wanted: dict[str, Tensor] = {}
    for step in range(3):
        mask = random_mask(model, 0.3, seed=step)
        fresh = cge.estimate(batch(step), mask)
        for name, grad in fresh.grads.items():
            wanted.setdefault(name, torch.zeros_like(grad))
        wanted = {name: torch.where(mask[name], fresh.grads.get(name, w), decay * w) for name, w in wanted.items()}
        assert estimator.backward(batch(step), mask).queries == fresh.queries
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        descend(model)
    held = sum(int((w != 0).sum()) for w in wanted.values())
    last = sum(int(m.sum()) for m in mask.values())
    assert held == last if decay == 0 else held > 1.5 * last


def test_stale_values_are_the_quotients_of_their_own_step() -> None:
    """Against plain float64: two halves of the weights, estimated at two different points."""
    model = network()
    first = random_mask(model, 0.5, seed=0)
    second = {name: ~m for name, m in first.items()}
    wanted = plain_quotients(model, objective, batch(0), first, 5e-3)
    estimator = StaleGE(model, objective, strict=True)
    estimator.backward(batch(0), first)
    descend(model)
    later = plain_quotients(model, objective, batch(1), second, 5e-3)
    judge(estimator.estimate(batch(1), second).grads, {n: wanted[n] + later[n] for n in wanted}).check(FLOAT32)


def test_estimate_and_a_failed_backward_leave_the_buffer_alone() -> None:
    model = network()
    estimator = StaleGE(model, objective, decay=0.5)
    estimator.backward(batch(), random_mask(model, 0.5, seed=0))
    before = {name: value.clone() for name, value in estimator.buffer.items()}
    spent = estimator.queries
    a, b = (estimator.estimate(batch(), random_mask(model, 0.5, seed=1)) for _ in range(2))
    nan = (batch()[0] * float("nan"), batch()[1])
    with pytest.raises(ObjectiveError, match="the loss is nan"):
        estimator.backward(nan, random_mask(model, 0.5, seed=2))
    assert estimator.queries == spent + a.queries + b.queries
    assert estimator.buffer.keys() == before.keys()
    assert all(torch.equal(estimator.buffer[name], before[name]) for name in before)
    # two dropout masks would be one too many: estimates draw the same one
    assert all(torch.equal(a.grads[name], b.grads[name]) for name in a.grads)


def test_the_buffer_is_no_alias_of_grad() -> None:
    model = network()
    estimator = StaleGE(model, objective)
    estimator.backward(batch())
    before = {name: value.clone() for name, value in estimator.buffer.items()}
    for p in model.parameters():
        p.grad.zero_()
    for grad in estimator.estimate(batch(), random_mask(model, 0.5, seed=0)).grads.values():
        grad.zero_()
    assert all(torch.equal(estimator.buffer[name], before[name]) for name in before)


def test_resumes_bit_for_bit() -> None:
    model = network()
    estimator = StaleGE(model, objective, decay=0.9)
    estimator.backward(batch(0), random_mask(model, 0.5, seed=0))
    file = io.BytesIO()
    torch.save(estimator.state_dict(), file)
    file.seek(0)
    resumed = StaleGE(model, objective, decay=0.9)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    a, b = (e.estimate(batch(1), random_mask(model, 0.5, seed=1)) for e in (estimator, resumed))
    assert estimator.queries == resumed.queries
    assert a.grads.keys() == b.grads.keys()
    assert all(torch.equal(a.grads[name], b.grads[name]) for name in a.grads)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (nn.Sequential(nn.Linear(6, 7)), r"of '0\.weight' has shape \[8, 6\], the model has shape \[7, 6\]"),
        (nn.Linear(6, 8), r"of '0\.weight' has shape \[8, 6\], the model has no such parameter"),
    ],
    ids=["shape", "name"],
)
def test_a_buffer_of_another_model(other: nn.Module, text: str) -> None:
    source, target = StaleGE(network(), objective), StaleGE(other, objective)
    source.backward(batch())
    with pytest.raises(CheckpointError, match=text):
        target.load_state_dict(source.state_dict())
    assert (target.queries, target.buffer) == (0, {})


def test_a_parameter_frozen_later_gets_no_gradient() -> None:
    model = network()
    estimator = StaleGE(model, objective)
    estimator.backward(batch())
    model[0].requires_grad_(False)
    assert estimator.estimate(batch()).grads.keys() == {"1.weight", "1.bias", "4.weight", "4.bias"}
