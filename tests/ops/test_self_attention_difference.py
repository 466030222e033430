"""self_attention_difference is the change of linear layers around an attention, when their input moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dzkernels
from dzkernels import backends
from dzkernels.backends import implementation
from helpers import RUNNERS, assert_bounded, assert_exact, running, strided
from ops.cases.self_attention_difference import SHAPES, Shape, apart, bound, case, cases
from ops.rows import double, norm_errors
from ops.table import check


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_ops_it_is_made_of(shape: Shape, scale: float) -> None:
    given = double(case(shape, scale))
    for change in ({}, {"residual": None}, {"norm": None}):
        given |= change
        with running("reference"):
            wanted = apart(given, torch.float64, torch.float64)
            assert_bounded(dzkernels.self_attention_difference(**given), wanted, 1e-14 * wanted.abs().amax())


@pytest.mark.parametrize("left_out", ["dq", "dk", "dv", "all"])
def test_a_kernel_without_one_of_the_changes_does_not_pass(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(backend: str, op: str) -> Callable[..., Tensor]:
        kernel = implementation(backend, op)

        def without(delta: Tensor, weight: Tensor, q: Tensor, *rest: Any, **options: Any) -> Tensor:
            inner, weight = q.shape[-1], weight.clone()
            features = {"dq": slice(inner), "dk": slice(inner, 2 * inner), "dv": slice(2 * inner, None)}
            weight[:, features.get(left_out, slice(None))] = 0.0
            return kernel(delta, weight, q, *rest, **options)

        return kernel if backend == "reference" else without

    monkeypatch.setattr(backends, "implementation", wrong)
    for row in cases():
        if row.args["q"].shape[2] > 1:  # the softmax of a single token stands still
            with pytest.raises(AssertionError, match="out of bounds"):
                check("self_attention_difference", row, "cpu", "cpu")


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0])
@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("runner", RUNNERS[1:])
def test_the_kernel_is_the_ops_it_is_made_of(runner: str, shape: Shape, operands: torch.dtype, scale: float) -> None:
    """Bit for bit. The change of the attention is rounded to bfloat16 only where that is what the CPU multiplies."""
    half = operands is torch.bfloat16 and runner == "cpu-amx"
    between = torch.bfloat16 if half else torch.float32
    for delta in (torch.float32, torch.bfloat16):
        for change in ({}, {"residual": None}, {"norm": None}):
            given = case(shape, scale) | change
            given["delta"] = given["delta"].to(delta)
            with running(runner):
                wanted = apart(given, operands, between)
                got = dzkernels.self_attention_difference(**given, operands=operands, out_dtype=torch.float32)
                assert_exact(got, wanted)
                rounded = dzkernels.self_attention_difference(**given, operands=operands, out_dtype=torch.bfloat16)
                assert_exact(rounded, wanted.bfloat16())


@pytest.mark.parametrize("scale", [1e-8, 1e-3])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_against_float64(shape: Shape, scale: float) -> None:
    given = case(shape, scale) | {"residual": None}
    wanted = dzkernels.self_attention_difference(**double(given))
    for runner in RUNNERS:
        with running(runner):
            got = dzkernels.self_attention_difference(**given)
        assert got.dtype == torch.float32 and got.is_contiguous()
        assert_bounded(got, wanted, bound(given))


@pytest.mark.parametrize("runner", RUNNERS)
def test_what_is_masked_stays_so(runner: str) -> None:
    """Where p is 0 for a token's key, nothing of that token reaches the others."""
    given = case(SHAPES[1], 1e-2) | {"residual": None, "norm": None}
    p = given["p"].clone()
    p[..., 2] = 0.0
    given["p"] = p / p.sum(-1, keepdim=True)
    moved = torch.zeros_like(given["delta"]).view(2, 2, 5, 7)
    moved[:, :, 2] = 1e-2
    given["delta"] = moved.view(2, 10, 7)
    with running(runner):
        got = dzkernels.self_attention_difference(**given).view(2, 2, 5, 9)
    assert torch.equal(got[:, :, [0, 1, 3, 4]], torch.zeros(2, 2, 4, 9))
    assert (got[:, :, 2] != 0).all()


@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runner", RUNNERS)
def test_nan_stays_in_its_sample(runner: str, operands: torch.dtype) -> None:
    given = case((3, 3, 2, 5, 4, 6, 7, 9), 1e-2)
    given["delta"][1, 7, 3] = given["residual"][2, 14, 2] = float("nan")
    with running(runner):
        got = dzkernels.self_attention_difference(**given, operands=operands)
    wanted = torch.zeros(3, 15, 9, dtype=torch.bool)
    wanted[1, 5:10], wanted[2, 14, 2] = True, True
    assert torch.equal(got.isnan(), wanted)


@pytest.mark.parametrize("runner", RUNNERS)
def test_odd_memory_and_empty(runner: str) -> None:
    given = case(SHAPES[1], 1e-2)
    norm = given["norm"]
    odd = {name: strided(t) if isinstance(t, Tensor) else t for name, t in given.items()}
    odd["norm"] = dzkernels.RowNorm(*(strided(t) for t in norm[:3]), norm.eps)
    with running(runner):
        assert_exact(dzkernels.self_attention_difference(**odd), dzkernels.self_attention_difference(**given))
        none = {**given, "delta": given["delta"][:0], "residual": given["residual"][:0]}
        assert dzkernels.self_attention_difference(**none).shape == (0, 10, 9)
        nobody = {name: given[name][:0] for name in ("q", "k", "v", "p")}
        empty = {**given, **nobody, "delta": given["delta"][:, :0], "residual": None, "norm": None}
        assert dzkernels.self_attention_difference(**empty).shape == (2, 0, 9)


@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 2, 3, 5, 4, 6, 7, 9), (2, 9, 2, 33, 8, 8, 16, 16)])
def test_threads_and_neighbours_do_not_matter(shape: Shape, operands: torch.dtype) -> None:
    given = case(shape, 0.05)
    wanted = dzkernels.self_attention_difference(**given, operands=operands)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_exact(dzkernels.self_attention_difference(**given, operands=operands), wanted)
    one = {**given, "delta": given["delta"][1:2], "residual": given["residual"][1:2]}
    assert_exact(dzkernels.self_attention_difference(**one, operands=operands), wanted[1:2])


GOOD = case((3, 2, 2, 2, 3, 5, 4, 6), 1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": 1.0}, TypeError, r"dz::self_attention_difference: delta must be a tensor, got float"),
        ({"delta": GOOD["delta"].long()}, TypeError, r"delta must be of a floating-point dtype, got int64"),
        ({"delta": GOOD["delta"][:, :3]}, ValueError, r"delta must be of shape \[P, N T, K\] = \[\*, 4, \*\], got"),
        ({"weight": GOOD["weight"].double()}, TypeError, r"weight must be float32, got float64"),
        ({"weight": GOOD["weight"][:1]}, ValueError, r"weight must be of shape \[H, 2 D \+ E, K\] = \[2, 11, 4\], got"),
        ({"q": GOOD["q"][0]}, ValueError, r"q must be of shape \[N, H, T, D\], got \[2, 2, 3\]"),
        ({"k": GOOD["k"][..., :2]}, ValueError, r"k must be of shape \[N, H, T, D\] = \[2, 2, 2, 3\], got"),
        ({"v": GOOD["v"][:1]}, ValueError, r"v must be of shape \[N, H, T, E\] = \[2, 2, 2, \*\], got"),
        ({"p": GOOD["p"][..., :1]}, ValueError, r"p must be of shape \[N, H, T, T\] = \[2, 2, 2, 2\], got"),
        ({"project": GOOD["project"][:, :9]}, ValueError, r"project must be of shape \[M, H E\] = \[\*, 10\], got"),
        ({"project": GOOD["project"][:0]}, ValueError, r"project must be non-empty in M, got \[0, 10\]"),
        ({"project": GOOD["project"].to("meta")}, ValueError, r"project must be on cpu like delta, got meta"),
        ({"residual": GOOD["residual"][:2]}, ValueError, r"residual must be of shape \[P, N T, M\] = \[3, 4, 6\], got"),
        *norm_errors(4, 4, "N T"),
        ({"operands": torch.int64}, TypeError, r"operands must be a floating-point dtype, got torch.int64"),
        ({"out_dtype": torch.int64}, TypeError, r"out_dtype must be a floating-point dtype, got torch.int64"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.self_attention_difference(**{**GOOD, **change})
