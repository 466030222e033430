"""What models and objectives of users do beside computing: none of it changes a number, and an estimate undoes it.

Gradients are compared with float64 quotients whose every call starts from a fresh copy of everything.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deepzero as dz
from deepzero.errors import DeviceError, MaskError, ObjectiveError
from deepzero.report.check import check as report
from deepzero.surroundings import CLONED, Surroundings
from judge import FLOAT32, judge

MU = 1e-2


def batch() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def quotients(make: Callable[[], tuple[nn.Module, Any, Any]]) -> dict[str, Tensor]:
    """Every call on a model, objective and batch made anew, in float64 and from the same random state."""

    def loss(name: str, i: int, step: float) -> float:
        model, objective, data = make()
        model = model.double()
        for other in Surroundings(model, objective).others:
            other.double()
        data = torch.utils._pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, data)
        with torch.no_grad():
            if name:
                model.get_parameter(name).reshape(-1)[i] += step
            torch.manual_seed(3)
            np.random.seed(3)
            random.seed(3)
            return float(objective(model, data))

    model = make()[0]
    base = loss("", 0, 0.0)
    found = {}
    for name, p in model.named_parameters():
        values = [(loss(name, i, MU) - base) / MU for i in range(p.numel())]
        found[name] = torch.tensor(values, dtype=torch.float64).reshape(p.shape)
    return found


def check(make: Callable[[], tuple[nn.Module, Any, Any]], *, whole: bool = False, tolerance: float = FLOAT32) -> None:
    """The quotients are right, and nothing that ``make`` made is changed by an estimate."""
    model, objective, data = make()
    places = Surroundings(model, objective)
    before = copy.deepcopy((model.state_dict(), data))
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    estimator = dz.CGE(model, objective, mu=MU)
    if whole:
        with pytest.warns(UserWarning, match="runs whole"):
            grads = estimator.estimate(data).grads
    else:
        grads = estimator.estimate(data).grads
    judge(grads, quotients(make)).check(tolerance)
    assert places.changed() == []
    now = (model.state_dict(), data)
    for a, b in zip(torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(now), strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)


def branching(x: Tensor) -> None:
    """What no tracer gets through."""
    if float(x.sum()) > 1e30:
        raise AssertionError


class Edits(nn.Module):
    """Its input in place."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self.layer, self.whole = nn.Linear(4, 3), whole
        self.register_buffer("count", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            branching(x)
        x.mul_(0.5)
        x[:, 0] = 0
        self.count.add_(1)
        return self.layer(x.to(self.layer.weight.dtype))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_input_edited_in_place(dtype: torch.dtype, whole: bool) -> None:
    def make() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        return Edits(whole=whole), mean_square, batch().to(dtype)

    check(make, whole=whole)


class Leaky(nn.Module):
    """A membrane in a plain attribute, carried from call to call."""

    def __init__(self, *, reset: bool, whole: bool) -> None:
        super().__init__()
        self.layer, self.reset, self.whole = nn.Linear(4, 3), reset, whole
        self.membrane = torch.full((6, 3), 0.25)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            branching(x)
        self.calls += 1
        if self.reset:
            self.membrane = torch.zeros(6, 3)
        for _ in range(2):
            self.membrane = 0.5 * self.membrane + self.layer(x)
        return self.membrane


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_state_in_an_attribute(reset: bool, whole: bool) -> None:
    def make() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        return Leaky(reset=reset, whole=whole), mean_square, batch()

    check(make, whole=whole)
    model, objective, data = make()
    twin = make()[0]
    if whole:
        with pytest.warns(UserWarning, match="runs whole"):
            dz.CGE(model, objective).backward(data)
    else:
        dz.CGE(model, objective).backward(data)
    objective(twin, data)
    assert torch.equal(model.membrane, twin.membrane)
    assert model.calls == twin.calls == 1


def test_carried_state_step_by_step() -> None:
    """Each step starts from what the step before left, as in an ordinary loop."""
    torch.manual_seed(0)
    model, twin = Leaky(reset=False, whole=False), Leaky(reset=False, whole=False)
    twin.load_state_dict(model.state_dict())
    estimator = dz.CGE(model, mean_square)
    for _ in range(3):
        loss = estimator.backward(batch()).loss
        with torch.no_grad():
            assert loss == float(mean_square(twin, batch()))
        assert torch.equal(model.membrane, twin.membrane)


def test_what_an_objective_or_a_hook_logs() -> None:
    log: list[Any] = []
    values: dict[str, Any] = {}
    model = nn.Linear(4, 3)
    model.register_forward_hook(lambda module, args, out: values.__setitem__("out", out.detach()))

    def objective(m: nn.Module, x: Tensor) -> Tensor:
        loss = mean_square(m, x)
        log.append(loss.detach())
        return loss

    estimator = dz.CGE(model, objective)
    estimator.estimate(batch())
    assert log == [] and values == {}
    estimator.backward(batch())
    assert [type(value) for value in log] == [Tensor]
    assert torch.equal(log[0], mean_square(model, batch()))
    assert type(values["out"]) is Tensor


@pytest.mark.parametrize("look", ["plan", "check"])
def test_a_plan_and_a_report_leave_everything(look: str) -> None:
    model, seen = Leaky(reset=False, whole=False), []

    def objective(m: nn.Module, x: Tensor) -> Tensor:
        loss = mean_square(m, x)
        seen.append(loss.detach())
        return loss

    places = Surroundings(model, objective)
    if look == "plan":
        dz.CGE(model, objective).plan(batch())
    else:
        report(model, objective, batch(), samples=2)
    assert places.changed() == [] and seen == []


class Centred:
    """An objective that is an object, with state of its own and of what it calls."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher, self.calls, self.mean = teacher, 0, torch.zeros(3)

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        self.calls += 1
        y = model(x) - self.teacher(x)
        self.mean = 0.5 * self.mean + y.mean(0)
        return (y - self.mean).square().mean()


totals: list[int] = []


class Logging(Centred):
    """Logs into a global, which only its ``__call__`` names."""

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        loss = super().__call__(model, x)
        totals.append(self.calls)
        return loss


def test_an_objective_that_is_an_object() -> None:
    def make() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        model, teacher = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        return model, Centred(teacher), batch()

    check(make)
    model, objective, data = make()
    objective = Logging(objective.teacher)
    estimator = dz.CGE(model, objective, mu=MU)
    estimator.estimate(data)
    assert objective.calls == 0 and not objective.mean.any() and totals == []
    estimator.backward(data)
    assert objective.calls == 1 and bool(objective.mean.any()) and totals == [1]


def test_a_nonlocal_counter() -> None:
    count = 0

    def objective(m: nn.Module, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return mean_square(m, x)

    estimator = dz.CGE(nn.Linear(4, 3), objective)
    estimator.estimate(batch())
    assert count == 0
    estimator.backward(batch())
    assert count == 1


def test_everything_is_put_back_after_an_exception() -> None:
    model = Leaky(reset=False, whole=True)
    before, first = model.membrane, float(model.layer.weight[0, 0].detach())

    def objective(m: nn.Module, x: Tensor) -> Tensor:
        loss = mean_square(m, x)
        if abs(float(m.layer.weight[0, 0].detach()) - first) > 1e-3:
            raise ZeroDivisionError
        return loss

    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="runs whole"):
        dz.CGE(model, objective, mu=0.5).estimate(batch())
    assert model.membrane is before
    assert model.calls == 0
    assert bool((model.membrane == 0.25).all())


@pytest.mark.parametrize("whole", [False, True])
def test_a_teacher_in_training_mode(whole: bool) -> None:
    def make() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()

        def objective(m: nn.Module, x: Tensor) -> Tensor:
            if whole:
                branching(x)
            return (m(x) - teacher(x)).square().mean()

        return nn.Linear(4, 3), objective, batch()

    check(make, whole=whole)
    model, objective, data = make()
    teacher = Surroundings(model, objective).others[0]
    mean = teacher[1].running_mean.clone()
    if whole:
        with pytest.warns(UserWarning, match="runs whole"):
            dz.CGE(model, objective).backward(data)
    else:
        dz.CGE(model, objective).backward(data)
    moved = teacher[1].running_mean.clone()
    teacher[1].running_mean.copy_(mean)
    objective(model, data)
    assert torch.equal(moved, teacher[1].running_mean) and not torch.equal(moved, mean)


def test_generators_of_its_own_when_a_model_runs_whole() -> None:
    def make() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        numbers, torchs = np.random.default_rng(5), torch.Generator().manual_seed(6)

        def objective(m: nn.Module, x: Tensor) -> Tensor:
            branching(x)
            noise = float(numbers.normal()) + torch.randn(3, generator=torchs)
            return (m(x) * noise).square().mean()

        return nn.Linear(4, 3), objective, batch()

    check(make, whole=True)


def test_noise_is_drawn_as_in_the_ordinary_call() -> None:
    """In float64 the generator would give other numbers: the quotients would be those of another loss."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 32)

        def forward(self, x: Tensor) -> Tensor:
            branching(x)
            z = self.layer(x)
            own = torch.rand(z.shape, out=torch.empty_like(z))
            return F.dropout(z, 0.5) + torch.randn_like(z) * z + torch.empty_like(z).uniform_() * z + own * z

    torch.manual_seed(0)
    model = Noisy()
    estimator = dz.CGE(model, mean_square, mu=1e-3)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="runs whole"):
        found = estimator.estimate(batch())
    torch.manual_seed(3)
    loss = mean_square(model, batch())
    assert float(loss.detach()) == found.loss
    loss.backward()
    for name, p in model.named_parameters():
        assert float((found.grads[name] - p.grad).norm()) <= 1e-2 * float(p.grad.norm()), name


def test_what_cannot_be_put_back_is_an_error() -> None:
    numbers = iter(range(10_000))

    def objective(m: nn.Module, x: Tensor) -> Tensor:
        branching(x)
        return mean_square(m, x) * (1 + next(numbers))

    with (
        pytest.warns(UserWarning, match="runs whole"),
        pytest.raises(ObjectiveError, match=r"two calls with the same batch.*give .* and .*, so their difference"),
    ):
        dz.CGE(nn.Linear(4, 3), objective).estimate(batch())
    large = torch.zeros(CLONED // 4 + 1)

    def writes(m: nn.Module, x: Tensor) -> Tensor:
        large.add_(1)
        return mean_square(m, x)

    with pytest.raises(ObjectiveError, match=r"a call changes objective\.large, a tensor of more than 4 MiB.*buffer"):
        dz.CGE(nn.Linear(4, 3), writes).estimate(batch())


@pytest.mark.parametrize("op", ["solve", "inv", "cholesky"])
def test_linear_algebra_that_checks_its_result(op: str) -> None:
    class Solver(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(2 * torch.eye(4) + 0.1 * torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            if op == "solve":
                return torch.linalg.solve(self.weight, x.T)
            if op == "inv":
                return torch.linalg.inv(self.weight) @ x.T
            return torch.linalg.cholesky(self.weight @ self.weight.T) @ x.T

    def make() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        return Solver(), mean_square, batch()

    with pytest.warns(UserWarning, match="has no difference rule"):
        check(make)


@pytest.mark.parametrize(
    "pick", [lambda z, x: z[x[:, 0] > 0], lambda z, x: z[(x > 0).nonzero()[:, 0]]], ids=["mask", "nonzero"]
)
def test_a_size_known_only_at_run_time(pick: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Before the first layer, and after it."""

    def make(first: bool) -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        if first:
            return nn.Linear(4, 3), lambda m, x: m(pick(x, x)).square().mean(), batch()
        return nn.Linear(4, 3), lambda m, x: pick(m(x), x).square().mean(), batch()

    for first in (True, False):
        check(lambda first=first: make(first))
        model, objective, data = make(first)
        estimator, other = dz.CGE(model, objective), data + 1  # more of it is picked, by the same graph
        estimator.estimate(data)
        again, alone = estimator.estimate(other), dz.CGE(model, objective).estimate(other)
        assert again.loss == alone.loss
        judge(again.grads, {name: grad.double() for name, grad in alone.grads.items()}).check(FLOAT32)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_modules_run_whole(how: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3) if how == "script" else nn.LayerNorm(3), nn.Tanh())
    model = torch.jit.script(plain) if how == "script" else torch.jit.trace(plain, batch())
    twin = copy.deepcopy(plain)
    estimator = dz.CGE(model, mean_square)
    with pytest.warns(UserWarning, match="runs whole"):
        found = estimator.estimate(batch())
    wanted = dz.CGE(twin, mean_square).estimate(batch())
    assert found.loss == pytest.approx(wanted.loss)
    judge(found.grads, {name: grad.double() for name, grad in wanted.grads.items()}).check(2 * FLOAT32)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert all(torch.equal(value, twin.get_buffer(name)) for name, value in before.items())
    estimator.backward(batch())
    mean_square(twin, batch())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name))
        assert not torch.equal(buffer, before[name])


@pytest.mark.parametrize("made_inside", [False, True])
def test_inside_inference_mode(made_inside: bool) -> None:
    model = nn.Linear(4, 3)
    estimator = dz.CGE(model, mean_square)
    data = batch()
    with torch.inference_mode():
        estimator.backward(batch() if made_inside else data)
    first = model.weight.grad.clone()
    estimator.backward(data)
    assert torch.equal(model.weight.grad, 2 * first)


def test_lazy_parameters_are_initialised_by_an_ordinary_call() -> None:
    model = nn.LazyLinear(3)
    grads = dz.CGE(model, mean_square).estimate(batch()).grads
    assert grads["weight"].shape == (3, 4)


def test_parameters_without_values_or_of_complex_numbers_are_refused() -> None:
    with pytest.raises(DeviceError, match=r"the parameter 'weight' is on the meta device.*to_empty"):
        dz.CGE(nn.Linear(4, 3, device="meta"), mean_square).estimate(batch())
    model = nn.Linear(4, 3, dtype=torch.complex64)
    with pytest.raises(MaskError, match=r"the parameter 'weight' has dtype torch.complex64.*view_as_complex"):
        dz.CGE(model, mean_square).estimate(batch())


def test_an_objective_of_another_model_is_an_error() -> None:
    other = nn.Linear(4, 3)
    with pytest.raises(ObjectiveError, match="the loss does not depend on any parameter that the mask selects"):
        dz.CGE(nn.Linear(4, 3), lambda m, x: mean_square(other, x)).estimate(batch())


def test_a_step_that_no_query_sees_is_said_once() -> None:
    estimator = dz.CGE(nn.Linear(4, 3), lambda m, x: m(x).round().mean(), mu=1e-7)
    with pytest.warns(UserWarning, match=r"none of 15 queries saw the loss change.*at mu = 1e-07") as caught:
        estimator.estimate(batch())
    assert caught[0].filename == __file__  # the user's line, not one of ours
    estimator.estimate(batch())  # a second warning would be an error here


# --- black boxes


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("source", ["torch", "numpy", "python", "own"])
def test_a_box_that_draws_sees_the_same_numbers_in_every_query(source: str, batched: bool) -> None:
    def make() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        own = np.random.default_rng(7)
        draw = {
            "torch": lambda: float(torch.randn(())),
            "numpy": lambda: float(np.random.randn()),
            "python": lambda: random.gauss(0, 1),
            "own": lambda: float(own.normal()),
        }[source]

        @dz.blackbox(batched=batched)
        def box(z: Tensor) -> Tensor:
            return (1 + draw()) * z + draw()

        return nn.Linear(4, 3), lambda m, x: box(m(x)).square().mean(), batch()

    check(make)


def test_a_box_may_write_its_input() -> None:
    def make() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)

        @dz.blackbox
        def box(z: Tensor) -> Tensor:
            return z.mul_(2).sum(1)

        return nn.Linear(4, 3), lambda m, x: box(m(x)).square().mean(), batch()

    check(make)


@pytest.mark.parametrize("result", [None, "text", {}])
def test_a_box_returns_numbers(result: Any) -> None:
    @dz.blackbox
    def box(z: Tensor) -> Any:
        return result

    kind = type(result).__name__
    with pytest.raises(ObjectiveError, match=f"black box 'box' returned {kind}. It must return one tensor, array or"):
        dz.CGE(nn.Linear(4, 3), lambda m, x: box(m(x)).mean()).estimate(batch())


def test_a_box_of_complex_numbers() -> None:
    with pytest.raises(ObjectiveError, match=r"returned torch.complex64. It must return real numbers"):
        dz.blackbox(lambda z: z.to(torch.complex64))(batch())


@pytest.mark.parametrize("batched", [False, True])
def test_a_box_whose_shape_changes(batched: bool) -> None:
    calls = 0

    @dz.blackbox(batched=batched)
    def box(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return z if calls < 3 else z[:, :1]

    text = r"black box 'box' returned shape \[\d+, 1\] in a query, where the base makes it \[\d+, 3\]"
    with pytest.raises(ObjectiveError, match=text):
        dz.CGE(nn.Linear(4, 3), lambda m, x: box(m(x)).square().mean()).estimate(batch())


def test_a_call_that_fails_is_counted() -> None:
    box = dz.blackbox(lambda z: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        box(batch())
    assert box.calls == 1


def test_a_trainer_of_another_model() -> None:
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"the estimator is of another model.*Make it of this one: CGE\(model"):
        dz.Trainer(model, dz.CGE(other, mean_square), optimizer, [batch()], epochs=1)
