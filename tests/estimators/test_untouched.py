"""``estimate`` touches nothing, ``backward`` moves what one forward would, and neither leaves half a step behind."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero.baselines import ForwardGE
from deepzero.errors import ObjectiveError
from deepzero.estimators import CGE, ESTIMATORS, RGE, Estimator
from untouched import assert_same, snapshot


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(3 * 5 * 5, 4),
    )


def objective(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 1, 5, 5, generator=generator), torch.randint(0, 4, (6,), generator=generator)


KINDS: dict[str, Callable[[nn.Module, Any], Estimator]] = {
    **ESTIMATORS,
    "cge central bfloat16": lambda m, o: CGE(m, o, scheme="central", precision="bfloat16"),
    "rge central": lambda m, o: RGE(m, o, queries=3, scheme="central", distribution="sphere"),
    "rge orthogonal": lambda m, o: RGE(m, o, queries=5, distribution="orthogonal"),
    "forward gradient": lambda m, o: ForwardGE(m, o, queries=3),
}


@pytest.fixture(params=KINDS, ids=str)
def build(request: pytest.FixtureRequest) -> Callable[[nn.Module, Any], Estimator]:
    return KINDS[request.param]


def test_the_snapshot_sees_a_moved_weight() -> None:
    model = network()
    before = snapshot(model)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-6
    with pytest.raises(AssertionError, match=r"0\.weight"):
        assert_same(before, snapshot(model))


def test_estimate_touches_nothing(build: Callable[..., Estimator]) -> None:
    model = network()
    model[1].requires_grad_(False)
    model[2].register_forward_hook(lambda module, args, out: None)
    estimator = build(model, objective)
    before = snapshot(model)
    result = estimator.estimate(batch())
    assert_same(before, snapshot(model))
    assert result.grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(bool(g.any()) for g in result.grads.values())


def test_estimate_is_repeatable(build: Callable[..., Estimator]) -> None:
    model = network()
    a, b = (build(model, objective).estimate(batch()) for _ in range(2))
    assert a.loss == b.loss
    assert all(torch.equal(a.grads[k], b.grads[k]) for k in a.grads)


def test_backward_moves_rng_and_buffers_as_one_forward(build: Callable[..., Estimator]) -> None:
    ours, plain = network(), network()
    estimator = build(ours, objective)
    masks = []
    for model in (ours, plain):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(7)
        for step in range(2):
            if model is ours:
                loss = estimator.backward(batch(step)).loss
            else:
                with torch.no_grad():
                    loss = float(objective(model, batch(step)))
            masks.append((loss, torch.get_rng_state()))
    (loss0, rng0), (loss1, rng1), (plain0, plain_rng0), (plain1, plain_rng1) = masks
    assert (loss0, loss1) == (plain0, plain1)
    assert torch.equal(rng0, plain_rng0)
    assert torch.equal(rng1, plain_rng1)
    assert not torch.equal(rng0, rng1), "two steps must draw two dropout masks"
    assert_same(snapshot(plain), snapshot(ours), but=("identity", "grad "))
    assert int(ours[1].num_batches_tracked) == 2


def test_backward_accumulates(build: Callable[..., Estimator]) -> None:
    model = network()
    model.eval()
    estimates = [build(model, objective).estimate(batch(i)) for i in range(2)]
    fresh = build(model, objective)
    start = fresh.state_dict()  # number of directions' estimate, stale gradients
    assert fresh.backward(batch(0)).loss == estimates[0].loss
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    fresh.load_state_dict(start)
    fresh.backward(batch(1))
    for name, parameter in model.named_parameters():
        assert torch.equal(first[name], estimates[0].grads[name]), name
        assert torch.equal(parameter.grad, first[name] + estimates[1].grads[name]), name


class Failing(nn.Module):
    """Raises at the n-th forward; moves a buffer and the random state first. An estimate puts no iterator back."""

    def __init__(self, error: BaseException, at: int) -> None:
        super().__init__()
        self.inner = network()
        self.error, self.at, self.calls = error, at, itertools.count(1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        call = next(self.calls)
        self.count += 1
        out = self.inner(x)
        if call >= self.at:
            raise self.error
        return out


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("call", ["estimate", "backward"])
def test_an_exception_leaves_nothing_behind(build: Callable[..., Estimator], call: str, at: int) -> None:
    model = Failing(RuntimeError("the simulator is down"), at)
    estimator = build(model, objective)
    before = snapshot(model)
    if at == 1:
        with pytest.raises(RuntimeError, match="the simulator is down"):
            getattr(estimator, call)(batch())
        assert_same(before, snapshot(model))
    else:  # the second call is the trace, after which the model runs whole and fails, or the second direction
        traced = not isinstance(estimator, ForwardGE)
        warned = pytest.warns(UserWarning, match="runs whole") if traced else contextlib.nullcontext()
        with warned, pytest.raises(RuntimeError, match="the simulator is down"):
            getattr(estimator, call)(batch())
        assert_same(before, snapshot(model))


def interrupt(delay: float, struck: threading.Event) -> None:
    """SIGINT after ``delay`` seconds, and again: python loses one that strikes inside a weak reference's callback."""
    while not struck.wait(delay):
        os.kill(os.getpid(), signal.SIGINT)
        delay = 5.0


def finished(timer: threading.Thread) -> None:
    """Waits for it. On a busy machine the second signal may be on its way before the first one was answered."""
    while timer.is_alive():
        with contextlib.suppress(KeyboardInterrupt):
            timer.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", ["estimate", "backward"])
def test_ctrl_c_leaves_nothing_behind(build: Callable[..., Estimator], call: str) -> None:
    """A real SIGINT, at many moments of the estimate."""
    model = network()
    estimator = build(model, objective)
    estimator.estimate(batch())
    interrupted = 0
    for delay in [0.0, 0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.02]:
        before = snapshot(model)
        struck = threading.Event()
        timer = threading.Thread(target=interrupt, args=(delay, struck))
        try:
            timer.start()
            while True:  # repeat until the signal strikes inside one of the calls
                done = copy.deepcopy(model)
                before = snapshot(model)
                getattr(estimator, call)(batch())
                del done
        except KeyboardInterrupt:
            struck.set()
            interrupted += 1
        finished(timer)
        after = snapshot(model)
        if call == "estimate":
            assert_same(before, after)
        else:
            moved = not torch.equal(before["torch rng"], after["torch rng"])
            if moved:  # the commit had begun: then it must be whole
                assert int(after["value 1.num_batches_tracked"]) == int(before["value 1.num_batches_tracked"]) + 1
                assert after["grad 0.weight"] is not None
            else:
                assert_same(before, after)
    assert interrupted == 8


def test_modes_are_the_callers(build: Callable[..., Estimator]) -> None:
    model = network()
    estimator = build(model, objective)
    model.eval()
    a = estimator.estimate(batch())
    model.train()
    b = estimator.estimate(batch())
    assert a.loss != b.loss
    model.eval()
    again = build(model, objective).estimate(batch())
    assert again.loss == a.loss


def test_nan_loss_is_named() -> None:
    model = network()
    with torch.no_grad():
        model[5].bias[0] = float("nan")
    with pytest.raises(ObjectiveError, match="the loss is nan before any perturbation"):
        CGE(model, objective).estimate(batch())
