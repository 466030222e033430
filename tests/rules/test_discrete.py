"""Piecewise constant networks, which backpropagation cannot train: bit for bit on dyadic grids, and on random data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from judge import judge
from rules.cases import Case, supervised
from rules.subject import Subject


def _spiking(h: Tensor, *, soft: bool) -> Tensor:
    """Leaky integrate-and-fire over five steps; the input of each step is scaled, so spikes come at various times."""
    v, spikes = torch.zeros_like(h), torch.zeros_like(h)
    for step in range(5):
        v = v * 0.5 + h * (0.25 * (step + 1))
        fired = (v >= 0.5).to(h.dtype)
        v = v - 0.5 * fired if soft else v * (1 - fired)
        spikes = spikes + fired
    return spikes


def _one_hot_argmax(h: Tensor) -> Tensor:
    return (torch.arange(h.shape[1]) == h.argmax(1, keepdim=True)).to(h.dtype)


def _quantise(h: Tensor, levels: int = 4) -> Tensor:
    return torch.round(h.clamp(-1, 1) * levels) / levels


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": torch.sign,
    "sgn": torch.sgn,
    "round": lambda h: torch.round(4 * h),
    "round-decimals": lambda h: torch.round(h * 2, decimals=0),
    "floor": lambda h: torch.floor(3 * h),
    "ceil": lambda h: torch.ceil(3 * h),
    "trunc": lambda h: torch.trunc(3 * h),
    "frac": lambda h: torch.frac(3 * h),
    "comparison": lambda h: (h > 0.125).to(h.dtype) - (h <= -0.25).to(h.dtype),
    "comparison-between": lambda h: (h >= h.roll(1, 1)).to(h.dtype) + (h < h.flip(1)).to(h.dtype),
    "equal": lambda h: (h.round() == 0).to(h.dtype) + (h.round() != 1).to(h.dtype),
    "logic": lambda h: ((h > 0) & ~(h > 0.5) | (h < -0.5)).to(h.dtype) + torch.logical_xor(h > 0, h.roll(1, 1) > 0),
    "hard-threshold": lambda h: torch.where(h.abs() > 0.25, h, 0.0),
    "hardshrink": lambda h: nn.functional.hardshrink(h, 0.25),
    "threshold": lambda h: nn.functional.threshold(h, 0.25, -1.0),
    "binary-weights": lambda h: torch.where(h >= 0, 1.0, -1.0).to(h.dtype),
    "quantiser": _quantise,
    "spiking-soft-reset": lambda h: _spiking(h, soft=True),
    "spiking-hard-reset": lambda h: _spiking(h, soft=False),
    "argmax": _one_hot_argmax,
    "argmin-index": lambda h: h * h.argmin(1, keepdim=True),
    "argmax-all": lambda h: h + h.argmax().to(h.dtype) / 64,
    "integer-cast": lambda h: (4 * h).to(torch.int32).to(h.dtype),
    "long-cast": lambda h: (4 * h).long() * h,
    "bool-cast": lambda h: h.round().bool().to(h.dtype),
    "floor-divide": lambda h: torch.div(h, 0.25, rounding_mode="floor"),
    "remainder": lambda h: torch.remainder(h, 0.25),
    "any-all": lambda h: (h > 0.75).any(1, keepdim=True).to(h.dtype) + (h > -0.75).all(1, keepdim=True) + h.round(),
    "count": lambda h: (h > 0).sum(1, keepdim=True).to(h.dtype) * h.sign(),
    "max-pool-of-signs": lambda h: h.sign().view(-1, 2, 4).amax(-1).repeat(1, 4),
    "sort-order": lambda h: h.sort(1).indices.to(h.dtype),
    "top-k-mask": lambda h: torch.zeros_like(h).scatter(1, torch.tensor([[0, 1]] * 12), 1.0) * h.topk(8, 1).indices,
}


class Net(nn.Module):
    """Linear -> op -> linear, with weights that are multiples of 1/16, or random."""

    def __init__(self, op: Callable[[Tensor], Tensor], *, grid: bool) -> None:
        super().__init__()
        self.one, self.two, self.op = nn.Linear(8, 8), nn.Linear(8, 4), op
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randint(-8, 9, p.shape) / 16 if grid else torch.randn(p.shape) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.op(self.one(x)))


def _square(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().mean()


def _weighted(out: Tensor, target: Tensor) -> Tensor:
    """Linear, so that on a grid float32 holds every digit; squares would need twice as many."""
    return (out * target).sum()


def _case(id: str, *, grid: bool) -> Case:
    def batch() -> tuple[tuple[Tensor], tuple[Tensor]]:
        if grid:
            return (torch.randint(-64, 65, (12, 8)) / 64,), (torch.randint(-2, 3, (12, 4)) / 2,)
        return (torch.randn(12, 8),), (torch.randn(12, 4),)

    return Case(id, lambda: Net(OPS[id], grid=grid), batch, supervised(_weighted if grid else _square))


@pytest.mark.parametrize("id", OPS)
def test_bit_for_bit_on_a_dyadic_grid(id: str) -> None:
    """Every number on the way is a small multiple of a power of two, so each difference has one right answer."""
    subject = Subject(_case(id, grid=True), per_tensor=24)
    for mu in (1 / 16, 1 / 4):
        want, _ = subject.plain(mu)
        got = subject.ours(mu, "float32")
        for name in want:
            assert torch.equal(got[name], want[name]), f"mu {mu:g}, {name}: {got[name] - want[name]}"


@pytest.mark.parametrize("id", OPS)
def test_random_data(id: str) -> None:
    """The same coordinates jump, by the same amount."""
    subject = Subject(_case(id, grid=False), per_tensor=24)
    for mu in (1e-1, 1e-2, 1e-3):
        want, loss = subject.plain(mu)
        got = subject.ours(mu, "float32")
        assert not (found := judge(got, want).faults(1e-5)), f"mu {mu:g}: {found}"
        noise = 64 * 2.0**-52 * max(1.0, abs(loss)) / mu
        for name in want:
            assert torch.equal(got[name].abs() > noise, want[name].abs() > noise), f"mu {mu:g}, {name}: other jumps"


def test_the_table_sees_jumps() -> None:
    """At these steps first-layer weights of a sign network do cross thresholds: the tests above are not about zeros."""
    subject = Subject(_case("sign", grid=False), per_tensor=64)
    assert int((subject.plain(1e-1)[0]["one.weight"] != 0).sum()) >= 5
    subject = Subject(_case("sign", grid=True), per_tensor=64)
    assert int((subject.plain(1 / 16)[0]["one.weight"] != 0).sum()) >= 5


class Codebook(nn.Module):
    """Vector quantisation: each row becomes the nearest code, by an index that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.codes = nn.Linear(8, 4), nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        nearest = (h.unsqueeze(1) - self.codes).square().sum(2).argmin(1)
        return self.codes[nearest]


def test_an_index_that_moves_is_right_and_loud() -> None:
    case = Case(
        "codebook",
        Codebook,
        lambda: ((torch.randn(5, 8),), (torch.randn(5, 4),)),
        supervised(_square),
        falls_back=("aten.index.Tensor",),
    )
    subject = Subject(case, per_tensor=24)
    want, _ = subject.plain(1e-1)
    with pytest.warns(UserWarning, match=r"^aten\.index\.Tensor has no difference rule"):
        got = subject.ours(1e-1, "float32")
    judge(got, want).check(1e-5)
