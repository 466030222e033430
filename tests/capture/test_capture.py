"""Capture: what a graph depends on, when it is made again, and what happens to models that cannot be captured."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import judge
from deepzero.errors import CaptureError, ObjectiveError, StepError
from deepzero.estimators import CGE, RGE
from deepzero.graph.bound import Bound
from deepzero.graph.capture import capture


def objective(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


@torch.no_grad()
def quotients(model: nn.Module, objective: Any, batch: Any, mu: float = 1e-3) -> dict[str, Tensor]:
    """Plain forward differences of every coordinate."""
    parameters = dict(model.named_parameters())
    everything = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    return judge.quotients(parameters, lambda: float(objective(model, batch)), everything, mu)[0]


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tol: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).norm()
        assert error <= tol * (want[name].double().norm() + 1e-2), f"{name}: {error}"


def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often a graph is made."""
    import deepzero.graph.cache as module

    made: list[int] = []
    real = module.capture

    def counting(bound: Bound) -> Any:
        made.append(1)
        return real(bound)

    monkeypatch.setattr(module, "capture", counting)
    return made


def test_one_capture_serves_every_batch_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    made = captures(monkeypatch)
    model = mlp()
    estimator = CGE(model, objective, mu=1e-3)
    for n in (6, 6, 4, 6, 4):  # a smaller last batch, twice
        result = estimator.estimate(batch(n))
        want = quotients(mlp().double(), objective, (batch(n)[0].double(), batch(n)[1]))
        assert_close(result.grads, want)
    assert len(made) == 2


def test_weights_may_change_between_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    made = captures(monkeypatch)
    model = mlp()
    estimator = CGE(model, objective, mu=1e-3)
    estimator.estimate(batch())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    got = estimator.estimate(batch()).grads
    twin = mlp().double()
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_((p.float() * 1.5).double())
    assert_close(got, quotients(twin, objective, (batch()[0].double(), batch()[1])))
    assert len(made) == 1


def test_a_replaced_parameter_is_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = captures(monkeypatch)
    model = mlp()
    estimator = CGE(model, objective)
    estimator.estimate(batch())
    model[0].weight = nn.Parameter(torch.ones(4, 5))
    estimator.estimate(batch())
    assert len(made) == 2


def test_mode_switch_is_captured_again() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    estimator = CGE(model, objective)
    train = estimator.estimate(batch())
    model.eval()
    test = estimator.estimate(batch())
    assert train.loss != test.loss


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = mlp(), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def test_a_changed_closure_constant_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = captures(monkeypatch)
    weight = 1.0

    def weighted(model: nn.Module, b: Any) -> Tensor:
        return weight * objective(model, b)

    estimator = CGE(mlp(), weighted)
    first = estimator.estimate(batch())
    weight = 1.0 + 1e-6  # far below what a comparison of losses could see
    second = estimator.estimate(batch())
    assert len(made) == 2
    name = "0.weight"
    assert torch.allclose(second.grads[name], first.grads[name] * weight, rtol=1e-7)
    assert not torch.equal(second.grads[name], first.grads[name])


def test_a_changed_module_attribute_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = captures(monkeypatch)
    model = Scaled()
    estimator = CGE(model, objective)
    estimator.estimate(batch())
    model.scale = 1.0 + 1e-6
    estimator.estimate(batch())
    assert len(made) == 2


def test_an_in_place_edit_of_a_closed_over_tensor_is_seen() -> None:
    weights = torch.ones(3)

    def weighted(model: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(model(b[0]), b[1], weight=weights)

    model = mlp()
    estimator = CGE(model, weighted, mu=1e-3)
    estimator.estimate(batch())
    weights[1] = 5.0
    got = estimator.estimate(batch()).grads
    double = weights.double()

    def reference(model: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(model(b[0]), b[1], weight=double)

    assert_close(got, quotients(mlp().double(), reference, (batch()[0].double(), batch()[1])))


class Counting(nn.Module):
    """Counts its calls in a plain attribute that the result does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = mlp(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def test_an_irrelevant_counter_does_not_recapture_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    made = captures(monkeypatch)
    estimator = CGE(Counting(), objective)
    for _ in range(5):
        estimator.estimate(batch())
    assert len(made) <= 2


def test_a_changing_function_that_cannot_be_followed_is_refused() -> None:
    scales = itertools.count(1)  # an iterator is not followed; the comparison of losses sees it

    def drifting(model: nn.Module, b: Any) -> Tensor:
        return next(scales) * objective(model, b)

    with pytest.raises(ObjectiveError, match="the captured graph gives a loss of"):
        CGE(mlp(), drifting).estimate(batch())


def test_a_changing_function_that_can_be_followed_starts_from_one_state() -> None:
    hidden = {"scale": 1.0}

    def drifting(model: nn.Module, b: Any) -> Tensor:
        hidden["scale"] *= 1.5
        return hidden["scale"] * objective(model, b)

    model = mlp()
    ours, plain = CGE(model, drifting), CGE(model, lambda m, b: 1.5 * objective(m, b))
    found, wanted = ours.estimate(batch()).grads, plain.estimate(batch()).grads
    assert hidden["scale"] == 1.0
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-7) for name in wanted)
    ours.backward(batch())
    assert hidden["scale"] == 1.5


def test_a_hidden_change_recaptures() -> None:
    hidden = {"scale": 1.0}

    def scaled(model: nn.Module, b: Any) -> Tensor:
        return hidden["scale"] * objective(model, b)

    estimator = CGE(mlp(), scaled)
    first = estimator.estimate(batch())
    hidden["scale"] = 2.0
    second = estimator.estimate(batch())
    assert torch.allclose(second.grads["0.weight"], 2 * first.grads["0.weight"], rtol=1e-6)


def test_batch_may_be_any_pytree() -> None:
    def keyed(model: nn.Module, b: Any) -> Tensor:
        return b["weight"] * F.cross_entropy(model(b["x"]), b["more"]["y"], label_smoothing=b["smooth"])

    x, y = batch()
    estimator = CGE(mlp(), keyed)
    one = estimator.estimate({"x": x, "more": {"y": y}, "smooth": 0.1, "weight": 1.0})
    two = estimator.estimate({"x": x, "more": {"y": y}, "smooth": 0.2, "weight": 1.0})
    assert one.loss != two.loss


def test_tied_weights_are_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids).tanh())

    ids = torch.tensor([1, 2, 2, 6])

    def loss(model: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(model(b), (b + 1) % 7)

    got = CGE(Tied(), loss, mu=1e-3).estimate(ids)
    assert list(got.grads) == ["embed.weight"]
    assert_close(got.grads, quotients(Tied().double(), loss, ids))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_tracing_leaves_recurrent_layers_usable(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.out = kind(5, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])

    model = Net()
    flat = list(model.rnn._flat_weights)
    before = model(batch()[0])
    CGE(model, objective).estimate(batch(), {"rnn.weight_hh_l0": torch.ones(model.rnn.weight_hh_l0.shape) > 0})
    assert all(a is b for a, b in zip(flat, model.rnn._flat_weights, strict=True))
    assert torch.equal(model(batch()[0]), before)


class Branching(nn.Module):
    """Python control flow on a value: cannot be captured."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inner, self.dtype = mlp(), dtype

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out * 2 if float(out.sum()) > 0 else out.sin()


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_what_cannot_be_captured_runs_whole(scheme: str) -> None:
    estimator = CGE(Branching(), objective, mu=1e-3, scheme=scheme)
    with pytest.warns(UserWarning, match="cannot be captured as a graph and runs whole, one full forward pass a query"):
        got = estimator.estimate(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        again = estimator.estimate(batch())
    assert all(torch.equal(got.grads[k], again.grads[k]) for k in got.grads)
    if scheme == "forward":
        assert_close(got.grads, quotients(Branching().double(), objective, (batch()[0].double(), batch()[1])), 1e-6)


def test_rge_of_a_whole_model_matches_its_captured_twin() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            float(self.inner[0].weight.sum())  # forces a value, nothing else
            return self.inner(x)

    captured = RGE(mlp(), objective, queries=7, mu=1e-3).estimate(batch())
    with pytest.warns(UserWarning, match="runs whole"):
        whole = RGE(Same(), objective, queries=7, mu=1e-3).estimate(batch())
    for name, grad in captured.grads.items():
        assert torch.allclose(whole.grads[f"inner.{name}"], grad, rtol=1e-4, atol=1e-6)


def test_strict_refuses_to_run_whole() -> None:
    with pytest.raises(CaptureError, match="strict=True, and the model cannot be captured"):
        CGE(Branching(), objective, strict=True).estimate(batch())


class HalfOnly(nn.Module):
    """An opaque model that insists on its own half-precision dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        if self.inner[0].weight.dtype is not torch.bfloat16:
            raise TypeError("this kernel exists in bfloat16 only")
        out = self.inner(x.bfloat16())
        return out.float() if float(out.sum()) > -1e9 else out


def test_a_step_that_vanishes_is_an_error_before_any_query() -> None:
    model = HalfOnly()
    with torch.no_grad():
        model.inner[0].weight[1, 2] = 2.0
    mask = {"inner.0.weight": torch.zeros(4, 5, dtype=torch.bool)}
    mask["inner.0.weight"][1, 2] = True
    with (
        pytest.warns(UserWarning, match="runs whole"),
        pytest.raises(StepError, match=r"step 0\.005 vanishes on 1 of 1 selected weights of 'inner\.0\.weight'"),
    ):
        CGE(model, objective, mu=5e-3).estimate(batch(), mask)


def test_captured_half_precision_weights_take_any_step() -> None:
    model = mlp().to(torch.bfloat16)

    def loss(m: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0].to(m[0].weight.dtype)), b[1])

    got = CGE(model, loss, mu=1e-6).estimate(batch()).grads
    twin = mlp().to(torch.bfloat16).double()
    reference = CGE(twin, loss, mu=1e-6, precision="float64").estimate((batch()[0].double(), batch()[1]))
    for name in got:
        assert got[name].dtype is torch.bfloat16
        assert torch.allclose(got[name].double(), reference.grads[name], rtol=2**-8, atol=1e-7)


def test_a_parameter_that_does_not_reach_the_loss_gets_zero() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.spare = mlp(), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    got = CGE(Spare(), objective).estimate(batch())
    assert torch.equal(got.grads["spare"], torch.zeros(2))


def test_capture_error_says_why() -> None:
    with pytest.raises(CaptureError, match=r"\w+: .+"):
        capture(Bound(Branching(), objective, batch()))
