"""Random-direction estimates: exact slopes, unbiased, of the predicted norm, and reproducible without global state.

All bounds follow from the moments of the directions. With E[u u^T] = I, one direction's estimate g = (u.s) u of a
gradient s in d dimensions has, per coordinate,

    gaussian     E g_i^2 = |s|^2 + 2 s_i^2                      E |g|^2 = (d + 2) |s|^2
    sphere       E g_i^2 = d / (d + 2) (|s|^2 + 2 s_i^2)        E |g|^2 = d |s|^2
    rademacher   E g_i^2 = |s|^2                                E |g|^2 = d |s|^2

and q independent ones average to a variance of (E g_i^2 - s_i^2) / q. An orthogonal estimate of q directions is d/q
times the projection P s on a uniform q-dimensional subspace. By symmetry E (P s)_i^2 = a s_i^2 + b |s|^2; the trace,
a + b d = q / d, and the moment of s.Ps / |s|^2 ~ Beta(q/2, (d-q)/2), a + b = q (q + 2) / (d (d + 2)), give both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deepzero as dz
from deepzero.errors import BudgetError
from deepzero.estimators import directions
from judge import FLOAT32, WideRGE, autograd, double_batch, double_copy, restored

DISTRIBUTIONS = ("gaussian", "sphere", "rademacher", "orthogonal")
SCHEMES = ("forward", "central")


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(features: int = 6, rows: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, features, generator=g), torch.randint(3, (rows,), generator=g)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))


def images() -> nn.Module:
    """A norm with a moving weight and bias, alone and with ReLU, pooling and a moving residual."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.conv(x)) + x)

    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), stem, Residual(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 3)
    )


class Linear(nn.Module):
    """A loss that is linear in the weights, s . w: a forward difference is the slope at every step."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d))

    def forward(self, s: Tensor) -> Tensor:
        return s @ self.w


def linear_objective(model: nn.Module, s: Tensor) -> Tensor:
    return model(s)


def slopes(d: int) -> Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(7))


def rows_of(estimator: WideRGE, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The directions that the next estimates draw, recorded as they are drawn."""
    drawn: list[Tensor] = []
    name = estimator.directions.distribution
    original = directions.DISTRIBUTIONS[name]

    def record(q: int, d: int, generator: torch.Generator) -> Iterator[Tensor]:
        assert d == sum(sizes)
        for u in original(q, d, generator):
            drawn.append(u)
            yield u

    monkeypatch.setitem(directions.DISTRIBUTIONS, name, record)
    return drawn


@pytest.mark.parametrize("mu", [1e-1, 5e-3, 1e-4])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("distribution", "pictures"), [*((name, False) for name in DISTRIBUTIONS), ("gaussian", True)])
def test_slopes_are_float64_loss_differences(distribution, pictures, scheme, mu, monkeypatch):
    """Every weight moves at once, through dropout and batch statistics; the reference runs the model itself."""
    model, data = (images(), batch(64)) if pictures else (network(), batch())
    estimator = WideRGE(
        model, cross_entropy, queries=6, distribution=distribution, scheme=scheme, mu=mu, seed=3, strict=True
    )
    drawn = rows_of(estimator, [p.numel() for p in model.parameters()], monkeypatch)
    found = estimator.estimate(data).grads
    assert len(drawn) == 6

    twin, wide = double_copy(model), double_batch(data)
    start = [p.detach().clone() for p in twin.parameters()]

    def loss(u: Tensor, h: float) -> float:
        with torch.no_grad():
            parts = u.double().split([p.numel() for p in start])
            for p, w, part in zip(twin.parameters(), start, parts, strict=True):
                p.copy_(w + h * part.reshape(w.shape))
        with restored(twin):
            return float(cross_entropy(twin, wide))

    base = loss(torch.zeros_like(drawn[0]), 0.0)
    exact = torch.tensor(
        [(loss(u, mu) - base) / mu if scheme == "forward" else (loss(u, mu) - loss(u, -mu)) / (2 * mu) for u in drawn],
        dtype=torch.float64,
    )
    u = torch.stack(drawn).double()
    flat = torch.cat([g.flatten() for g in found.values()])
    # flat = slope @ u / 6 and the six directions are independent, so the slopes can be read back
    mine = torch.linalg.lstsq(u.t(), 6 * flat).solution
    assert float((mine - exact).norm()) <= FLOAT32 * float(exact.norm())
    wanted = exact @ u / 6
    assert float((flat - wanted).norm()) <= FLOAT32 * float(wanted.norm())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_precision_bfloat16_slopes(distribution):
    """Half-width operands with the very same directions."""
    model, data = network(), batch()
    found = [
        WideRGE(model, cross_entropy, queries=8, distribution=distribution, precision=p, strict=True).estimate(data)
        for p in ("float64", "bfloat16")
    ]
    want, got = (torch.cat([g.flatten() for g in e.grads.values()]) for e in found)
    assert 0 < float((got - want).norm()) <= 2e-2 * float(want.norm())


# --- moments


def second_moment(distribution: str, s: Tensor) -> Tensor:
    """E g_i^2 of one direction, per coordinate."""
    d, whole = len(s), s.square().sum()
    return {
        "gaussian": whole + 2 * s.square(),
        "sphere": d / (d + 2) * (whole + 2 * s.square()),
        "rademacher": whole.expand(d),
    }[distribution]


def variance(distribution: str, s: Tensor, q: int) -> Tensor:
    """Of an estimate of q directions, per coordinate."""
    if distribution != "orthogonal":
        return (second_moment(distribution, s) - s.square()) / q
    d = len(s)
    b = q * (d - q) / (d * (d + 2) * (d - 1))
    a = q * (q + 2) / (d * (d + 2)) - b
    return (d / q) ** 2 * (a * s.square() + b * s.square().sum()) - s.square()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_unbiased(distribution, scheme):
    """The mean over many estimates lies within 5 standard errors of the gradient, per coordinate and in all: a chance
    of 1e-5 in a fixed draw that either holds or does not."""
    d = 12
    q, times = (5, 400) if distribution == "orthogonal" else (100, 100)
    s = slopes(d)
    estimator = WideRGE(Linear(d), linear_objective, queries=q, distribution=distribution, scheme=scheme, mu=1e-2)
    mean = torch.stack([estimator.estimate(s).grads["w"] for _ in range(times)]).mean(0)
    wide = s.double()
    expected = variance(distribution, wide, q) / times
    off = mean - wide
    assert bool((off.abs() <= 5 * expected.sqrt()).all())
    assert float(off.norm()) <= 5 * math.sqrt(float(expected.sum()))
    # and it is no constant: the error is not far below its size either
    assert float(off.norm()) >= 0.1 * math.sqrt(float(expected.sum()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unbiased_for_the_smoothed_loss(scheme):
    """Logistic regression: a forward difference adds mu/2 (u.Hu) u, whose mean is zero by symmetry; what is left is of
    order mu^2 and far below the standard error at mu = 1e-3."""
    torch.manual_seed(0)
    model, data = nn.Linear(4, 3), batch(4)
    q, times = 128, 50
    estimator = WideRGE(model, cross_entropy, queries=q, scheme=scheme, mu=1e-3)
    total = None
    for _ in range(times):
        g = torch.cat([g.flatten() for g in estimator.estimate(data).grads.values()])
        total = g if total is None else total + g
    s = torch.cat([g.flatten() for g in autograd(model, cross_entropy, data).values()])
    error = math.sqrt(float((second_moment("gaussian", s) - s.square()).sum()) / (q * times))
    assert float((total / times - s).norm()) <= 5 * error


@pytest.mark.parametrize("q", [16, 64])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS[:3])
def test_norm_ratio(distribution, q):
    """E |g|^2 = (q - 1 + E|g_1|^2 / |s|^2) / q |s|^2, which is (q + d + 1) / q for Gaussian directions and
    (q + d - 1) / q for the others: sqrt((q + d) / q) within sqrt(1 +- 1 / (q + d))."""
    d, times = 40, 100
    s = slopes(d)
    estimator = WideRGE(Linear(d), linear_objective, queries=q, distribution=distribution, mu=1e-2)
    squares = torch.stack([estimator.estimate(s).grads["w"].square().sum() for _ in range(times)]) / float(
        s.square().sum()
    )
    expected = (q + d + (1 if distribution == "gaussian" else -1)) / q
    error = float(squares.std()) / math.sqrt(times)  # the spread itself is measured, its mean is predicted
    assert abs(float(squares.mean()) - expected) <= 5 * error
    assert 5 * error <= 0.5 * expected, "too few estimates to say anything"
    ratio = math.sqrt(float(squares.mean()))
    nominal = math.sqrt((q + d) / q)
    assert abs(ratio / nominal - 1) <= 1 / (q + d) + 5 * error / expected


# --- orthogonal


def test_orthogonal_estimates_are_projections():
    """|g|^2 = (d/q)^2 s.Ps, of mean d/q |s|^2 and the variance of a Beta(q/2, (d-q)/2)."""
    d, q, times = 40, 16, 100
    s = slopes(d)
    estimator = WideRGE(Linear(d), linear_objective, queries=q, distribution="orthogonal", mu=1e-2)
    found = [estimator.estimate(s).grads["w"].square().sum() / s.square().sum() for _ in range(times)]
    spread = d / q * math.sqrt(2 * (d - q) / (q * (d + 2)) / times)
    assert abs(float(torch.stack(found).mean()) - d / q) <= 5 * spread


def test_as_many_orthogonal_directions_as_coordinates_give_the_whole_gradient():
    """Within a mask too: the directions span its subspace and nothing else."""
    d = 30
    s, mask = slopes(d), {"w": torch.arange(30) % 2 == 0}
    for chosen, q in ((None, 30), (mask, 15)):
        grads = WideRGE(Linear(d), linear_objective, queries=q, distribution="orthogonal").estimate(s, chosen).grads
        wanted = s.double() if chosen is None else torch.where(mask["w"], s.double(), 0)
        # the d float32 directions are off right angles by their rounding, and the slopes by that of float32 sums
        assert float((grads["w"] - wanted).norm()) <= d * 2.0**-24 * float(wanted.norm())


@pytest.mark.parametrize("group", [2, 3, 100])
def test_groups_of_orthogonal_directions(group, monkeypatch):
    """All of one length, at right angles within a group that fits the memory bound, and independent across groups."""
    d, q = 50, 7
    monkeypatch.setattr(directions, "ORTHOGONAL_BYTES", group * 8 * d)
    u = torch.stack(list(directions.Directions(q, "orthogonal", 0).draw(d, 0))).double()
    products = u @ u.t() / d
    same = torch.arange(q)[:, None] // group == torch.arange(q) // group
    bound = 2 * 2.0**-24  # each direction is rounded to float32 once
    assert bool(((products - torch.eye(q)).abs() <= bound)[same].all())
    assert bool((products.abs() > bound)[~same].all())


# --- reproducible, local, masked, counted


def flat(estimate: dz.Estimate) -> Tensor:
    return torch.cat([g.flatten() for g in estimate.grads.values()])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_directions_follow_from_seed_and_number_alone(distribution):
    model, data = Linear(30), slopes(30)

    def make(seed: int) -> WideRGE:
        return WideRGE(model, linear_objective, queries=5, distribution=distribution, seed=seed, mu=1e-2)

    first, second = make(3), make(3)
    torch.manual_seed(0)
    a = [flat(first.estimate(data)) for _ in range(3)]
    torch.manual_seed(99)
    torch.rand(17)
    b = [flat(second.estimate(data)) for _ in range(3)]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a[1], a[2])
    assert not torch.equal(flat(make(4).estimate(data)), a[0])
    resumed = make(3)
    resumed.load_state_dict({"queries": 0, "estimates": 2})
    assert torch.equal(flat(resumed.estimate(data)), a[2])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_block_size_changes_nothing_but_rounding(scheme, distribution):
    """float64 carriers: other blocks only change the order of a sum of 11 terms and the shape of matrix products."""
    model, data = network(), batch()
    found = []
    for block in (None, 1, 4, 11, 100):
        estimator = WideRGE(
            model, cross_entropy, queries=11, scheme=scheme, distribution=distribution, block=block, precision="float64"
        )
        found.append(flat(estimator.estimate(data)))
    for other in found[1:]:
        assert float((other - found[0]).norm()) <= 1e-12 * float(found[0].norm())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_global_random_state_is_not_read_or_moved(distribution):
    model, data = Linear(8), slopes(8)  # one ordinary forward of it draws nothing
    estimator = WideRGE(model, linear_objective, queries=3, distribution=distribution)
    before = torch.get_rng_state()
    estimator.estimate(data)
    assert torch.equal(torch.get_rng_state(), before)
    dz.RGE(model, linear_objective, queries=3, distribution=distribution).backward(
        data
    )  # one ordinary forward of this model draws nothing
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_masked_coordinates_are_exactly_zero_and_selected_ones_are_not(distribution):
    model, data = network(), batch()
    g = torch.Generator().manual_seed(2)
    mask = {
        "0.weight": torch.rand(8, 6, generator=g) < 0.3,
        "1.bias": torch.rand(8, generator=g) < 0.5,
        "4.bias": torch.zeros(3, dtype=torch.bool),
    }
    found = WideRGE(model, cross_entropy, queries=4, distribution=distribution, strict=True).estimate(data, mask)
    assert set(found.grads) <= set(mask)
    for name in ("0.weight", "1.bias"):
        values, chosen = found.grads[name], mask[name]
        assert bool((values[~chosen] == 0).all())
        assert bool((values[chosen] != 0).all())


def test_masked_out_weights_do_not_move():
    """The slope along the selected coordinates alone: s.u over the mask, not over everything."""
    d = 20
    s = slopes(d)
    chosen = torch.arange(d) % 3 == 0
    times, q = 50, 80
    estimator = WideRGE(Linear(d), linear_objective, queries=q)
    mean = torch.stack([estimator.estimate(s, {"w": chosen}).grads["w"] for _ in range(times)]).mean(0)
    inside = s[chosen].double()
    expected = variance("gaussian", inside, q).sum() / times
    assert float((mean[chosen] - inside).norm()) <= 5 * math.sqrt(float(expected))


@pytest.mark.parametrize(("scheme", "spent"), [("forward", 8), ("central", 15)])
def test_queries_are_counted_and_the_budget_holds(scheme, spent):
    """q + 1 or 2 q + 1 evaluations, whatever the number of weights."""
    model, data = Linear(9), slopes(9)
    estimator = dz.RGE(model, linear_objective, queries=7, scheme=scheme, budget=2 * spent + 1)
    assert estimator.estimate(data).queries == spent
    assert estimator.backward(data).queries == spent
    assert estimator.queries == 2 * spent
    before = model.w.grad.clone()
    with pytest.raises(BudgetError):
        estimator.backward(data)
    assert estimator.queries == 2 * spent
    assert torch.equal(model.w.grad, before)
