"""Exact and bounded comparison, and data that makes float32 sums exact. Proved to fail in test_helpers.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dzkernels

_LEVELS = [level for level, refusal in dzkernels.build_info()["isa_refusals"].items() if refusal is None]
# Every way an op can run on this CPU: the reference, and the C++ kernel at each instruction set level.
RUNNERS = ["reference", *(f"cpu-{level}" for level in _LEVELS)]


@contextlib.contextmanager
def running(runner: str) -> Iterator[None]:
    """Run ops the way `runner`, one of RUNNERS, says."""
    backend, _, level = runner.partition("-")
    with contextlib.ExitStack() as stack:
        stack.enter_context(dzkernels.use_backend(backend))
        if level:
            stack.enter_context(dzkernels.use_isa(level))
        yield


def pooled(rows: Sequence[Any], size: Callable[[Any], Sequence[int]]) -> list[Any]:
    """Each shape of ``rows``, pytest.params of one value, with each window of 1, 2 or 3 that fits into its size."""
    return [
        pytest.param(*row.values, pool, id=f"{row.id}-{pool}")
        for row in rows
        for pool in (1, 2, 3)
        if pool <= min(size(*row.values))
    ]


# Half an epsilon: the largest relative error of one rounding.
UNIT: dict[torch.dtype, float] = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}


def small_ints(*shape: int, seed: int, low: int = -4, high: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Integers in low .. high. Sums of a few thousand products of them are exact in float32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def integers(size: Sequence[int], high: int, *, seed: int) -> Tensor:
    """Indices in 0 .. high - 1."""
    return torch.randint(0, high, tuple(size), generator=torch.Generator().manual_seed(seed))


def strided(tensor: Tensor) -> Tensor:
    """The same values in memory that is contiguous in no dimension, with NaN in the gaps."""
    holder = tensor.new_full(
        [2 * size + 1 for size in tensor.shape], float("nan") if tensor.is_floating_point() else -9
    )
    view = holder[tuple(slice(1, 2 * size + 1, 2) for size in tensor.shape)]
    view.copy_(tensor)
    return view


def _describe(got: Tensor, wanted: Tensor, wrong: Tensor, what: str) -> str:
    at = tuple(wrong.nonzero()[0].tolist())
    count, size = int(wrong.sum()), wrong.numel()
    return (
        f"{what}: {count} of {size} elements; first at {list(at)}: got {got[at].item()!r}, wanted {wanted[at].item()!r}"
    )


def _same_form(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape, f"shape: got {list(got.shape)}, wanted {list(wanted.shape)}"


def assert_exact(got: Tensor, wanted: Tensor) -> None:
    """Same shape, same dtype, same numbers (0 equals -0). NaN is never accepted."""
    _same_form(got, wanted)
    assert got.dtype == wanted.dtype, f"dtype: got {got.dtype}, wanted {wanted.dtype}"
    wrong = ~(got == wanted)
    if wrong.any():
        raise AssertionError(_describe(got, wanted, wrong, "not equal"))


def assert_bounded(got: Tensor, wanted: Tensor, bound: Tensor | float) -> None:
    """|got - wanted| <= bound for each element, compared in float64. NaN in any of the three fails."""
    _same_form(got, wanted)
    wide_got, wide_wanted = got.detach().double(), wanted.detach().double()
    limit = torch.as_tensor(bound, dtype=torch.float64).expand(got.shape)
    assert bool((limit >= 0).all()), "the bound itself is negative or NaN"
    # Equal infinities have no finite difference, but agree.
    wrong = ~(((wide_got - wide_wanted).abs() <= limit) | ((wide_got == wide_wanted) & wide_got.isinf()))
    if wrong.any():
        excess = (wide_got - wide_wanted).abs() / limit
        worst = excess[excess.isfinite()].max().item() if excess.isfinite().any() else float("inf")
        raise AssertionError(_describe(got, wanted, wrong, "out of bounds") + f"; worst is {worst:.3g} bounds away")
