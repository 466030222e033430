"""Carriers against brute force: each is a way to write down one dense difference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from deepzero import carriers
from deepzero.carriers import Dense, OneChannel, OneEntry, Zero, dense
from helpers import integers, normal

P = 4
SHAPES = [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 2, 3)]


def entry(shape: tuple[int, ...], seed: int = 0) -> OneEntry:
    columns = [integers([P], size, seed=seed + k) for k, size in enumerate(shape)]
    index = torch.stack(columns, 1) if columns else torch.zeros((P, 0), dtype=torch.int64)
    return OneEntry(shape, index, normal(P, seed=seed))


def channel(shape: tuple[int, ...], dim: int, seed: int = 0) -> OneChannel:
    values = normal(P, *carriers.without(shape, dim), seed=seed)
    return OneChannel(shape, dim, integers([P], shape[dim], seed=seed), values)


def brute(carrier: carriers.Carrier) -> Tensor:
    """The dense form, entry by entry."""
    if isinstance(carrier, Dense):
        return carrier.values.clone()
    assert isinstance(carrier, OneEntry | OneChannel)
    out = torch.zeros(P, *carrier.shape)
    for p in range(P):
        if isinstance(carrier, OneEntry):
            out[(p, *carrier.index[p].tolist())] = carrier.step[p]
        else:
            out[p].select(carrier.dim, int(carrier.channel[p])).copy_(carrier.values[p])
    return out


def every(shape: tuple[int, ...]) -> list[carriers.Carrier]:
    kinds: list[carriers.Carrier] = [entry(shape), Dense(normal(P, *shape, seed=7))]
    return kinds + [channel(shape, dim, seed=3 + dim) for dim in range(len(shape))]


@pytest.mark.parametrize("shape", [(), *SHAPES])
def test_dense(shape: tuple[int, ...]) -> None:
    for carrier in every(shape):
        assert torch.equal(dense(carrier), brute(carrier))
        assert tuple(dense(carrier).shape) == (P, *shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_channel_of_an_entry(shape: tuple[int, ...]) -> None:
    for dim in range(len(shape)):
        seen = carriers.one_channel(entry(shape), dim)
        assert seen.dim == dim
        assert torch.equal(brute(seen), brute(entry(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_add(shape: tuple[int, ...]) -> None:
    for a, b in itertools.product(every(shape), repeat=2):
        kept = brute(a), brute(b)
        assert torch.equal(dense(carriers.add(a, b)), kept[0] + kept[1])
        assert torch.equal(brute(a), kept[0]), "the first operand was written to"
        assert torch.equal(brute(b), kept[1]), "the second operand was written to"
        assert carriers.add(a, Zero) is a
        assert carriers.add(Zero, b) is b
    assert carriers.add(Zero, Zero) is Zero


def test_add_of_the_same_channel_stays_one_channel() -> None:
    a = channel((2, 3, 4), 1)
    b = OneChannel(a.shape, a.dim, a.channel.clone(), normal(P, 2, 4, seed=9))
    total = carriers.add(a, b)
    assert isinstance(total, OneChannel)
    assert torch.equal(brute(total), brute(a) + brute(b))


def test_add_to_an_expanded_difference_does_not_write_through() -> None:
    """A broadcast bias is one number seen many times: adding into it in place would be wrong everywhere else."""
    wide = Dense(normal(P, 1, 3, seed=1).expand(P, 2, 3))
    other = channel((2, 3), 1)
    assert torch.equal(dense(carriers.add(wide, other)), wide.values + brute(other))


@pytest.mark.parametrize("shape", SHAPES)
def test_select(shape: tuple[int, ...]) -> None:
    base = normal(*shape, seed=2)
    for dim in range(len(shape)):
        at = integers([P], shape[dim], seed=dim)
        got = carriers.select(base, dim, at)
        assert torch.equal(got, torch.stack([base.select(dim, int(c)) for c in at]))


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 3, 4), (24,)), ((24,), (4, 3, 2)), ((2, 3, 4), (6, 4)), ((3, 4), (3, 1, 4)), ((1,), ()), ((), (1, 1))],
)
def test_entry_view(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    seen = carriers.entry_view(entry(before), after)
    assert seen.shape == after
    assert torch.equal(brute(seen), brute(entry(before)).reshape(P, *after))


def test_describe() -> None:
    assert carriers.describe(Zero) == "Zero"
    assert carriers.describe(entry((2, 3))) == "OneEntry"
    assert carriers.describe((channel((2, 3), 0), Zero)) == "OneChannel"
    assert carriers.describe(Dense(torch.zeros(1, 2))) == "Dense"
