"""Corners that a review found: each was a wrong number, a crash or something left behind."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deepzero as dz
from deepzero.errors import ObjectiveError
from deepzero.report.check import check


class Scaled(nn.Module):
    """f(p * x) with a parameter p of any shape."""

    def __init__(self, f: Any, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.p = f, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.p * x)


FUNCTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "gelu of a deviation": (lambda v: F.gelu(v.std(0)).sum(), (4, 3)),
    "gelu of a mean": (lambda v: F.gelu(v.mean()), (4, 3)),
    "softmax of a log-softmax": (lambda v: (torch.softmax(torch.log_softmax(v, -1) / 2, -1) ** 2).sum(), (4, 3)),
    "softmax of a variance": (lambda v: (torch.softmax(v / v.var(0), -1) ** 2).sum(), (4, 3)),
    "layer norm of a variance": (lambda v: (F.layer_norm(v / v.var(0), (3,)) ** 3).sum(), (4, 3)),
    "one image, average pool": (lambda v: (F.avg_pool2d(v, 2) ** 3).sum(), (2, 8, 4)),
    "one image, adaptive pool": (lambda v: (F.adaptive_avg_pool2d(v, 3) ** 3).sum(), (2, 8, 4)),
    "one volume, average pool": (lambda v: (F.avg_pool3d(v, 2) ** 3).sum(), (2, 8, 4, 4)),
    "scatter of a mean": (
        lambda v: (torch.zeros_like(v).scatter_add(0, torch.zeros(1, 3, dtype=torch.int64), v[:1]) * v.mean()).sum(),
        (4, 3),
    ),
    "complex values run whole": (lambda v: torch.fft.rfft(v).abs().sum(), (4, 6)),
}


@pytest.mark.filterwarnings("ignore:the model cannot be captured:UserWarning")
@pytest.mark.parametrize(("f", "shape"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_quotients_are_exact(f: Any, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    report = check(Scaled(f, *shape), lambda m, b: m(b), torch.randn(shape, generator=generator), mu=1e-2)
    assert report.ok, str(report)


@pytest.mark.filterwarnings("ignore:.*has no difference rule:UserWarning")
def test_a_loss_that_reads_the_new_running_statistics() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def loss(m: nn.Module, b: Tensor) -> Tensor:
        return m(b).pow(3).mean() + 10 * m[1].running_mean.square().sum()

    report = check(net, loss, torch.randn(6, 3), mu=1e-2)
    assert report.ok, str(report)


def test_a_loss_that_is_a_parameter() -> None:
    net = Scaled(None)
    assert torch.allclose(dz.CGE(net, lambda m, b: m.p).estimate(torch.ones(1)).grads["p"], torch.ones(()))


@pytest.mark.parametrize("make", [lambda: SimpleNamespace(a=1e-7), lambda: {"a": 1e-7}], ids=["namespace", "dict"])
def test_a_small_constant_in_a_container_is_seen(make: Any) -> None:
    constants = make()

    def loss(m: nn.Module, b: Tensor) -> Tensor:
        return (constants["a"] if isinstance(constants, dict) else constants.a) * m(b).square().mean()

    torch.manual_seed(0)
    estimator = dz.CGE(nn.Linear(3, 2), loss)
    first = estimator.estimate(torch.ones(4, 3)).grads["weight"]
    if isinstance(constants, dict):
        constants["a"] = 2e-7
    else:
        constants.a = 2e-7
    second = estimator.estimate(torch.ones(4, 3)).grads["weight"]
    assert torch.allclose(second, 2 * first, rtol=1e-5, atol=0)


def test_autocast_does_not_reach_the_queries() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(5, 4)
    plain = dz.CGE(net, lambda m, b: m(b).float().square().mean()).estimate(x).grads
    with torch.autocast("cpu", torch.bfloat16):
        inside = dz.CGE(net, lambda m, b: m(b).float().square().mean()).estimate(x).grads
    for name, want in plain.items():
        assert (inside[name] - want).norm() <= 1e-5 * want.norm(), name


def test_attributes_with_reserved_beginnings_stay() -> None:
    net = nn.Linear(3, 2)
    net._modules_to_save, net._buffers_ready = ["a"], 1
    dz.CGE(net, lambda m, b: m(b).sum()).estimate(torch.ones(2, 3))
    assert (net._modules_to_save, net._buffers_ready) == (["a"], 1)


@pytest.mark.parametrize("call", ["estimate", "backward"])
def test_a_forward_that_writes_its_weights_is_refused_and_undone(call: str) -> None:
    net = nn.Embedding(5, 3, max_norm=0.1)
    before = net.weight.detach().clone()
    with pytest.raises(ObjectiveError, match="the forward pass writes the parameter 'weight' in place"):
        getattr(dz.CGE(net, lambda m, b: m(b).sum()), call)(torch.tensor([0, 3]))
    assert torch.equal(net.weight, before)


def test_a_buffer_that_forward_fills_in_is_empty_again() -> None:
    class Lazy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.seen is None:
                self.seen = torch.ones(2)
            return super().forward(x) * self.seen

    net = Lazy(3, 2)
    net.register_buffer("seen", None)
    dz.CGE(net, lambda m, b: m(b).sum()).estimate(torch.ones(2, 3))
    assert net.seen is None


class Boxed(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.box = nn.Linear(3, 2), dz.blackbox(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.box(self.inner(x)).sum()


def test_a_replaced_box_is_seen() -> None:
    net = Boxed(lambda v: v.square())
    estimator = dz.CGE(net, lambda m, b: m(b))
    first = estimator.estimate(torch.ones(4, 3)).grads["inner.bias"]
    net.box = dz.blackbox(lambda v: 3 * v.square())
    second = estimator.estimate(torch.ones(4, 3)).grads["inner.bias"]
    assert torch.allclose(second, 3 * first, rtol=1e-5)


def test_a_copied_box_is_a_box_of_its_own() -> None:
    net = Boxed(lambda v: v.square())
    twin = copy.deepcopy(net)
    del net
    assert bool(dz.CGE(twin, lambda m, b: m(b)).estimate(torch.ones(4, 3)).grads["inner.bias"].any())


def test_a_box_with_integers_first_keeps_its_digits() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    box = dz.blackbox(lambda y, v: 1000 + v.gather(1, y[:, None]).square().sum())
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    got = dz.CGE(net, lambda m, b: box(labels, m(b)), mu=1e-5).estimate(x).grads["bias"]
    loss = net(x).gather(1, labels[:, None]).square().sum()
    want = torch.autograd.grad(loss, net.bias)[0]
    assert torch.allclose(got, want, rtol=1e-3)


@pytest.mark.parametrize(("inputs", "kinds"), [((), "nothing"), ((torch.ones(1), None), "Tensor, NoneType")])
def test_what_a_box_takes(inputs: Any, kinds: str) -> None:
    with pytest.raises(TypeError, match=f"takes one or more positional tensors, got {kinds}"):
        dz.blackbox(lambda *a: a[0])(*inputs)
