"""The table of kernel cases: every op with its cases. The same rows run in Triton's interpreter (interpret_triton.py)
and, with the larger ones, on a GPU (test_gpu.py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import dzkernels
from dzkernels import backends
from helpers import UNIT, assert_bounded, assert_exact, strided
from ops.case import HALF_UNIT, Case
from ops.moments import moments_by_rerun

CASES: dict[str, Callable[[], Iterator[Case]]] = {
    op: importlib.import_module(f"ops.cases.{op}").cases for op in dzkernels.OPS
}


def check(op: str, case: Case, backend: str, device: str) -> None:
    """`backend` on `device` against the reference on the CPU; in odd memory it gives the same bits again.

    Moments, where they are asked for, against those of the very result that they came with.
    """

    def run(args: dict[str, Any]) -> tuple[Tensor, ...]:
        moved = tree_map_only(Tensor, lambda values: values.to(device), args)
        with dzkernels.use_backend(backend):
            return tuple(t.cpu() for t in results(getattr(dzkernels, op)(**moved)))

    if backend in case.refused or backends._refusal(backend, op, torch.device(device), case.dtype) is not None:
        assert backend in case.refused or case.dtype != torch.float32, f"{backend} refuses {op}"
        try:
            run(case.args)
        except dzkernels.BackendError:
            return
        raise AssertionError(f"{backend} has no {case.dtype} kernel for {op}, but ran it")
    with dzkernels.use_backend("reference"):
        wanted, *_ = results(getattr(dzkernels, op)(**case.args))
    got, *left = run(case.args)
    for values in left:
        assert_bounded(values, *moments_by_rerun(got, case.args["next_zc"]))
    assert _layout(got) == _layout(wanted), f"strides: got {got.stride()}, wanted {wanted.stride()}"
    bound = allowed(case, wanted)
    if case.nan:
        assert wanted.isnan().any() and torch.equal(got.isnan(), wanted.isnan()), "NaN in other places"
        got, wanted, bound = got.nan_to_num(0), wanted.nan_to_num(0), bound.nan_to_num(0)
    if case.bound is None:
        assert_exact(got, wanted)
    else:
        assert got.dtype == wanted.dtype, f"dtype: got {got.dtype}, wanted {wanted.dtype}"
        assert_bounded(got, wanted, bound)
    odd, *again = run(tree_map_only(Tensor, strided, case.args))
    odd = odd.nan_to_num(0) if case.nan else odd
    for one, other in zip([odd, *again], [got, *left], strict=True):
        assert_exact(one, other)


def allowed(case: Case, wanted: Tensor) -> Tensor:
    """How far a kernel's result may be from the reference's, `wanted`; both round to its dtype."""
    if case.bound is None:
        return torch.zeros((), dtype=torch.float64)
    unit = HALF_UNIT if wanted.dtype == torch.bfloat16 else UNIT[wanted.dtype]
    return case.bound + 2 * unit * wanted.double().abs()


def results(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What an op gives, moments or not, as a tuple."""
    return values if isinstance(values, tuple) else (values,)


def _layout(values: Tensor) -> list[int]:
    """Strides where they matter."""
    return [stride for stride, size in zip(values.stride(), values.shape, strict=True) if size > 1 and values.numel()]
