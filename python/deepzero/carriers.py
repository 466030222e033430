"""How a difference travels through the graph: Zero, OneEntry, OneChannel or Dense.

Index letters used everywhere: p perturbation, n sample, c channel. P is the number of perturbations in a block.
The *shape* of a carrier is the shape of the value it belongs to, without the leading P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


class _Zero:
    """Nothing changed, in any perturbation of the block."""

    def __repr__(self) -> str:
        return "Zero"


Zero: Final = _Zero()


@dataclass(frozen=True)
class OneEntry:
    """Perturbation p moves exactly one entry: ``value[index[p]] += step[p]``. How a coordinate of CGE starts.

    index  [P, rank] int64
    step   [P]
    """

    shape: tuple[int, ...]
    index: Tensor
    step: Tensor


@dataclass(frozen=True)
class OneChannel:
    """Perturbation p changes only ``value.select(dim, channel[p])``.

    channel  [P] int64
    values   [P, *shape without dim]
    """

    shape: tuple[int, ...]
    dim: int
    channel: Tensor
    values: Tensor


@dataclass(frozen=True)
class Dense:
    """Anything may have changed. values [P, *shape]."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])


Carrier = _Zero | OneEntry | OneChannel | Dense


def without(shape: Sequence[int], dim: int) -> list[int]:
    """``shape`` with dimension ``dim`` left out."""
    return [*shape[:dim], *shape[dim + 1 :]]


def empty_dense(count: int, shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised [P, *shape]; images [N, C, H, W] get channels-last memory, where convolutions are fastest."""
    if len(shape) == 4:
        n, c, h, w = shape
        return like.new_empty((count, n, h, w, c)).permute(0, 1, 4, 2, 3)
    return like.new_empty((count, *shape))


def dense(carrier: Carrier) -> Tensor:
    """The difference as one tensor [P, *shape]. Zero has no shape and is the caller's case to skip."""
    if isinstance(carrier, Dense):
        return carrier.values
    if isinstance(carrier, OneEntry):
        out = carrier.step.new_zeros((len(carrier.step), *carrier.shape))
        at = (torch.arange(len(out), device=out.device), *carrier.index.unbind(1))
        out[at] = carrier.step
        return out
    assert isinstance(carrier, OneChannel)
    out = empty_dense(len(carrier.values), carrier.shape, carrier.values).zero_()
    rows = torch.arange(len(out), device=out.device)
    out.movedim(carrier.dim + 1, 1)[rows, carrier.channel] = carrier.values
    return out


def one_channel(carrier: OneEntry, dim: int) -> OneChannel:
    """The same difference, seen as one channel along ``dim``."""
    rest = without(carrier.shape, dim)
    index = without(carrier.index.unbind(1), dim)  # type: ignore[arg-type]
    return OneChannel(
        carrier.shape,
        dim,
        carrier.index[:, dim],
        dense(OneEntry(tuple(rest), torch.stack(index, 1), carrier.step)) if rest else carrier.step,  # type: ignore[arg-type]
    )


def select(base: Tensor, dim: int, channel: Tensor) -> Tensor:
    """``base.select(dim, channel[p])`` for every p: [P, *shape without dim]."""
    return base.movedim(dim, 0).index_select(0, channel)


def same_channel(a: OneChannel, b: OneChannel) -> bool:
    """Whether both lie in the same channels. Values are compared on a CPU only: elsewhere looking means waiting."""
    if a.dim != b.dim or a.channel is b.channel:
        return a.dim == b.dim
    if a.channel.is_cpu:
        return torch.equal(a.channel, b.channel)
    same_memory = a.channel.data_ptr() == b.channel.data_ptr() and a.channel.stride() == b.channel.stride()
    return same_memory and a.channel.shape == b.channel.shape


def occurs(rare: Tensor) -> bool:
    """Whether a case that takes extra work is among these flags; taken for granted where looking means waiting."""
    return not rare.is_cpu or bool(rare.any())


def add(a: Carrier, b: Carrier) -> Carrier:
    """The sum of two differences of the same value."""
    if a is Zero:
        return b
    if b is Zero:
        return a
    if isinstance(a, OneChannel) and isinstance(b, OneChannel) and same_channel(a, b):
        return OneChannel(a.shape, a.dim, a.channel, a.values + b.values)
    if isinstance(a, OneChannel):
        a, b = b, a
    if isinstance(b, OneChannel):
        # only one channel of the sum differs from `a`: add it there instead of building a second dense tensor
        out = dense(a)
        out = out.clone() if isinstance(a, Dense) else out
        rows = torch.arange(len(out), device=out.device)
        moved = out.movedim(b.dim + 1, 1)
        moved[rows, b.channel] = (moved[rows, b.channel] + b.values).to(out.dtype)
        return Dense(out)
    return Dense(dense(a) + dense(b))


def entry_view(carrier: OneEntry, shape: Sequence[int]) -> OneEntry:
    """The same entry after ``view(shape)`` of a contiguous value."""
    flat = torch.zeros_like(carrier.index[:, 0]) if carrier.shape else torch.zeros_like(carrier.step, dtype=torch.int64)
    for k, size in enumerate(carrier.shape):
        flat = flat * size + carrier.index[:, k]
    parts = []
    for size in reversed(shape):
        parts.append(flat % size)
        flat = flat // size
    index = torch.stack(parts[::-1], 1) if parts else flat.new_zeros((len(flat), 0))
    return OneEntry(tuple(shape), index, carrier.step)


def describe(carrier: object) -> str:
    """The carrier's name, as the plan prints it."""
    if isinstance(carrier, tuple | list):
        return describe(carrier[0])
    return "Zero" if carrier is Zero or carrier is None else type(carrier).__name__
