"""Whole models: every parameter tensor's quotients against float64 with the same step, at steps from 1e-1 to 1e-8."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn

import deepzero as dz
from exactness.small import cross_entropy, images
from judge import (
    BFLOAT16,
    FLOAT32_TINY,
    MUS,
    PLAIN_MU,
    WideCGE,
    autograd,
    judge,
    ours,
    plain_quotients,
    sampled,
    tolerance,
)

# name -> model, images [n, c, size, size], random coordinates of each tensor beside the one with the largest gradient
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int]] = {
    **{f"cnn-depth{d}": (functools.partial(dz.models.paper_cnn, d), (4, 3, 32), 2) for d in range(1, 6)},
    "resnet20": (dz.models.resnet20, (8, 3, 32), 1),
    "vit": (functools.partial(dz.models.vit, image_size=16, blocks=2, width=24), (4, 3, 16), 2),
    "mlp": (dz.models.mlp, (8, 1, 28), 3),
}
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Case:
    """A model in training mode, its batch, sampled coordinates, and references computed once for both precisions."""

    def __init__(self, name: str, weights: str) -> None:
        build, size, each = MODELS[name]
        torch.manual_seed(0)
        self.model = build().train().to(WEIGHTS[weights])
        x, y = images(*size)
        self.batch = (x.to(WEIGHTS[weights]), y)
        self.mask = sampled(self.model, cross_entropy, self.batch, each if weights == "float32" else 0)
        self.estimators: dict[str, WideCGE] = {}
        self.references: dict[float, dict[str, Tensor]] = {}

    def ours(self, mu: float, precision: str) -> dict[str, Tensor]:
        """One estimator per precision, so that the model is traced once; nothing in it depends on mu."""
        if precision not in self.estimators:
            self.estimators[precision] = WideCGE(self.model, cross_entropy, precision=precision, strict=True)
        self.estimators[precision].mu = mu
        return self.estimators[precision].estimate(self.batch, self.mask).grads

    def reference(self, mu: float) -> dict[str, Tensor]:
        if mu not in self.references:
            plain = mu >= PLAIN_MU
            self.references[mu] = self.plain(mu) if plain else self.ours(mu, "float64")
        return self.references[mu]

    def plain(self, mu: float) -> dict[str, Tensor]:
        return plain_quotients(self.model, cross_entropy, self.batch, self.mask, mu)


@functools.cache
def case(name: str, weights: str) -> Case:
    return Case(name, weights)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_quotients_are_those_of_float64(weights, name, mu):
    """bfloat16 weights against a float64 copy of them: steps far below their spacing are still exact."""
    this = case(name, weights)
    for precision in ("float32", "bfloat16"):
        judge(this.ours(mu, precision), this.reference(mu)).check(tolerance(precision, mu))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_at_1e_8_the_quotient_is_the_gradient(weights, name):
    this = case(name, weights)
    slope = autograd(this.model, cross_entropy, this.batch, this.mask)
    judge(this.ours(1e-8, "float32"), slope).check(FLOAT32_TINY)
    judge(this.ours(1e-8, "bfloat16"), slope).check(BFLOAT16)


@pytest.mark.parametrize("name", MODELS)
def test_float64_propagation_is_plain_float64(name):
    """The reference of the small steps, within the noise of the reference of the large ones.

    A plain quotient subtracts two losses L of rounding error d each: 2 d / mu. With d = 64 u L that leaves room for
    the depth of a network; both losses are of order one, and so is 1 / (slack of the rule), see judge().
    """
    this = case(name, "float32")
    unit = 2.0**-53
    loss = 4.0
    for mu in (1e-1, 5e-3, 1e-4):
        plain, propagated = this.reference(mu), this.ours(mu, "float64")
        for key, q in plain.items():
            bound = 2 * 64 * unit * loss / mu + 1e-11 * q.abs()
            assert bool(((propagated[key] - q).abs() <= bound).all()), (key, mu)


def test_parameters_get_these_numbers_rounded_once():
    """WideCGE only leaves out the last rounding to the parameter's dtype."""
    for weights in WEIGHTS:
        this = case("cnn-depth2", weights)
        wide = this.ours(5e-3, "float32")
        public = dz.CGE(this.model, cross_entropy, mu=5e-3, strict=True).estimate(this.batch, this.mask).grads
        for name, parameter in this.model.named_parameters():
            assert public[name].dtype is parameter.dtype
            assert torch.equal(public[name], wide[name].to(parameter.dtype))


# --- 50 digits on a net small enough to write out


class Tiny(nn.Module):
    """Linear, batch norm with batch statistics, tanh, linear: 3 -> 4 -> 3."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def digits50(weights: dict[str, Any], x: Any, labels: list[int]) -> Any:
    """The cross-entropy of Tiny in mpmath; weights and x are nested lists of mpf."""

    def linear(rows: Any, w: Any, b: Any) -> Any:
        return [[mpmath.fdot(row, col) + c for col, c in zip(w, b, strict=True)] for row in rows]

    z = linear(x, weights["first.weight"], weights["first.bias"])
    n = len(z)
    columns = []
    for k, column in enumerate(zip(*z, strict=True)):
        mean = mpmath.fsum(column) / n
        var = mpmath.fsum((v - mean) ** 2 for v in column) / n
        scale = weights["norm.weight"][k] / mpmath.sqrt(var + mpmath.mpf(1e-5))
        columns.append([mpmath.tanh((v - mean) * scale + weights["norm.bias"][k]) for v in column])
    logits = linear([list(row) for row in zip(*columns, strict=True)], weights["second.weight"], weights["second.bias"])
    losses = [mpmath.log(mpmath.fsum(map(mpmath.exp, row))) - row[y] for row, y in zip(logits, labels, strict=True)]
    return mpmath.fsum(losses) / n


def exact(values: Any) -> Any:
    return [exact(v) for v in values] if isinstance(values, list) else mpmath.mpf(values)


@pytest.mark.parametrize("mu", [1e-1, 1e-6, 1e-8])
def test_against_fifty_digits(mu):
    """float64 propagation loses a few units in the last place at any step, so it may be the reference of float32."""
    torch.manual_seed(3)
    model = Tiny()
    with torch.no_grad():
        for p in (model.norm.weight, model.norm.bias):
            p.add_(0.3 * torch.randn(4))
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(5, 3, generator=g), torch.randint(3, (5,), generator=g)
    mask = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    with mpmath.workdps(50):
        weights = {name: exact(p.tolist()) for name, p in model.named_parameters()}
        rows, labels, step = exact(x.tolist()), y.tolist(), mpmath.mpf(mu)
        base = digits50(weights, rows, labels)
        wanted = {}
        for name, p in model.named_parameters():
            wanted[name] = torch.zeros_like(p, dtype=torch.float64, requires_grad=False)
            for at in map(tuple, mask[name].nonzero().tolist()):
                holder = weights[name] if len(at) == 1 else weights[name][at[0]]
                before = holder[at[-1]]
                holder[at[-1]] = before + step
                wanted[name][at] = float((digits50(weights, rows, labels) - base) / step)
                holder[at[-1]] = before
    judge(ours(model, cross_entropy, (x, y), mask, mu, "float64"), wanted).check(1e-12)
    judge(ours(model, cross_entropy, (x, y), mask, mu), wanted).check(1e-5)
    if mu >= PLAIN_MU:
        judge(plain_quotients(model, cross_entropy, (x, y), mask, mu), wanted).check(1e-12)
