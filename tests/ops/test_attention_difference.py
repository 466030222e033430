"""attention_difference is the change of softmax(scale q k^T + mask) v when q, k and v move."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import dzkernels
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, normal, running, small_ints, strided
from ops.cases.attention_difference import MOVES, SHAPES, Shape, U, bound, changed, inputs, wide

SMALL = SHAPES[1]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("step", [1e-8, 1e-5, 1e-3, 0.03, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_against_float64(shape: Shape, step: float, causal: bool) -> None:
    args = inputs(shape, step, causal)
    wanted = dzkernels.attention_difference(**wide(args))
    limit = bound(args)
    for runner in RUNNERS:
        with running(runner):
            got = dzkernels.attention_difference(**args)
        assert got.dtype == torch.float32
        assert (got.transpose(2, 3) if len(shape[1]) == 2 else got).is_contiguous()
        assert_bounded(got, wanted, limit)


@pytest.mark.parametrize("step", [1e-6, 1.0, 30.0])
@pytest.mark.parametrize("moves", [m for n in (1, 2, 3) for m in itertools.combinations(MOVES, n)])
def test_what_stands_still(moves: tuple[str, ...], step: float) -> None:
    args = inputs(SMALL, step, True, moves)
    zeros = {name: torch.zeros(1, *args[name[1:]].shape) if args[name] is None else args[name] for name in MOVES}
    wanted = dzkernels.attention_difference(**wide(args))
    assert_bounded(wanted, dzkernels.attention_difference(**wide({**args, **zeros})), 1e-13 * max(step, 1e-4) ** 2)
    for runner in RUNNERS:
        with running(runner):
            assert_bounded(dzkernels.attention_difference(**args), wanted, bound(args))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("step", [1e-8, 1e-4, 1e-2, 1.0, 10.0])
def test_the_reference_is_a_float64_rerun(step: float, causal: bool) -> None:
    """To the noise of running twice, some 64 roundings of the values."""
    args = wide(inputs((3, (2, 2), 6, 6, 8, 5), step))
    mask = torch.zeros(6, 6, dtype=torch.float64)
    if causal:
        mask = mask.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (args["scale"] * q @ k.mT + mask).softmax(-1) @ v

    args["p"] = (args["scale"] * args["q"] @ args["k"].mT + mask).softmax(-1)
    before = attention(args["q"], args["k"], args["v"])
    after = attention(args["q"] + args["dq"], args["k"] + args["dk"], args["v"] + args["dv"])
    got = dzkernels.attention_difference(**args)
    assert got.dtype == torch.float64
    assert_bounded(got, after - before, 64 * UNIT[torch.float64] * (1 + step) ** 2 * 8)


def test_tiny_steps_are_the_derivative() -> None:
    """At 1e-30 every second-order term is gone: the change is the directional derivative, scaled."""
    args = inputs((1, (2,), 9, 9, 8, 16), 1.0)
    primals = tuple(args[name].double() for name in "qkv")
    tangents = tuple(args["d" + name][0].double() for name in "qkv")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (args["scale"] * q @ k.mT).softmax(-1) @ v

    _, slope = torch.func.jvp(attention, primals, tangents)
    tiny = {**args, **{name: args[name] * 1e-30 for name in MOVES}}
    limit = bound(tiny) + 1e-36  # p is rounded
    for runner in RUNNERS:
        with running(runner):
            assert_bounded(dzkernels.attention_difference(**tiny)[0], slope * 1e-30, limit[0])


@pytest.mark.parametrize("runner", RUNNERS)
def test_masked_keys_have_no_say(runner: str) -> None:
    args = inputs((2, (3,), 4, 37, 8, 16), 0.1)
    args["p"][:, :, 20:] = 0
    args["p"] /= args["p"].sum(-1, keepdim=True)
    calm = dict(args)
    for name, calmed in (("dk", 0.0), ("dv", 1e3)):
        calm[name] = args[name].clone()
        calm[name][..., 20:, :] = calmed
    with running(runner):
        assert_exact(dzkernels.attention_difference(**calm), dzkernels.attention_difference(**args))


@pytest.mark.parametrize("runner", RUNNERS)
def test_huge_changes(runner: str) -> None:
    """All attention goes to one key, whose score grows by far more than exp can hold."""
    args = inputs((1, (1,), 3, 5, 4, 6), 1.0, moves=("dk",))
    args["dk"].zero_()
    args["q"] = args["q"].abs() + 1
    args["dk"][:, :, 2] = 1e4
    with running(runner):
        got = dzkernels.attention_difference(**args)
    wanted = args["v"][:, 2:3].double() - args["p"].double() @ args["v"].double()
    assert_bounded(got[0], wanted, 64 * U)


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_number_of_rows_and_columns(runner: str) -> None:
    """Small numbers, so that products alone (dv) are exact: each tile shape, with each rest of rows and columns."""
    for size in range(1, 40):
        dv = small_ints(1, 1, 9, size, seed=1)
        p = small_ints(1, 40 - size, 9, seed=2).abs() / 4
        q, k, v = torch.zeros(1, 40 - size, 2), torch.zeros(1, 9, 2), torch.zeros(1, 9, size)
        with running(runner):
            assert_exact(dzkernels.attention_difference(None, None, dv, q, k, v, p, scale=1.0)[0], p @ dv[0])


@pytest.mark.parametrize("half_in", [False, True])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]])
def test_half(shape: Shape, out_dtype: torch.dtype | None, half_in: bool) -> None:
    dtype = torch.bfloat16 if half_in else torch.float32
    args = inputs(shape, 0.1, dtype=dtype)
    wanted = dzkernels.attention_difference(**wide(args))
    into = dtype if out_dtype is None else out_dtype
    rounding = UNIT.get(into, 0.0) if into in (torch.bfloat16, torch.float16) else 0.0
    limit = bound(args)
    limit = limit + rounding * (wanted.abs() + limit) + (2.0**-25 if into == torch.float16 else 0.0)
    for runner in RUNNERS:
        with running(runner):
            got = dzkernels.attention_difference(**args, out_dtype=out_dtype)
        assert got.dtype == into
        assert_bounded(got, wanted, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runner", RUNNERS)
def test_heads_of_one_projection(runner: str, dtype: torch.dtype) -> None:
    """[P, N, T, 3, H, D], the output of one linear layer, is read where it lies."""
    qkv = (normal(3, 2, 19, 3, 4, 8, seed=1) * 0.1).to(dtype)
    base = normal(2, 19, 3, 4, 8, seed=2)
    dq, dk, dv = (qkv[:, :, :, i].transpose(2, 3) for i in range(3))
    q, k, v = (base[:, :, i].transpose(1, 2) for i in range(3))
    p = (q @ k.mT / 3).softmax(-1)
    merged = [d.flatten(1, 2) for d in (dq, dk, dv)] + [x.flatten(0, 1) for x in (q, k, v, p)]
    with running(runner):
        got = dzkernels.attention_difference(dq, dk, dv, q, k, v, p, scale=1 / 3)
        wanted = dzkernels.attention_difference(*merged, scale=1 / 3)
    assert_exact(got.flatten(1, 2), wanted)
    assert got.transpose(2, 3).is_contiguous()
    assert wanted.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("runner", RUNNERS)
def test_odd_memory_and_empty(runner: str, shape: Shape) -> None:
    args = inputs(shape, 0.1)
    with running(runner):
        wanted = dzkernels.attention_difference(**args)
        assert_exact(dzkernels.attention_difference(**changed(args, strided)), wanted)
        every = {**args, **{name: args[name][:1].expand(4, *args[name].shape[1:]) for name in MOVES}}
        assert_exact(dzkernels.attention_difference(**every)[3], wanted[0])
        none = {**args, **{name: args[name][:0] for name in MOVES}}
        assert dzkernels.attention_difference(**none).shape == (0, *wanted.shape[1:])
        no_rows = {**args, "q": args["q"][..., :0, :], "p": args["p"][..., :0, :], "dq": args["dq"][..., :0, :]}
        assert dzkernels.attention_difference(**no_rows).shape == (*wanted.shape[:-2], 0, wanted.shape[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (5, (2, 3), 150, 20, 8, 8)])
def test_threads_and_neighbours_do_not_matter(shape: Shape, dtype: torch.dtype) -> None:
    args = inputs(shape, 0.1, dtype=dtype)
    wanted = dzkernels.attention_difference(**args)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_exact(dzkernels.attention_difference(**args), wanted)
    last = {name: value[-1:] if isinstance(value, Tensor) and name in MOVES else value for name, value in args.items()}
    assert_exact(dzkernels.attention_difference(**last), wanted[-1:])
    bottom = {**args, "q": args["q"][..., -1:, :], "p": args["p"][..., -1:, :], "dq": args["dq"][..., -1:, :]}
    assert_exact(dzkernels.attention_difference(**bottom), wanted[..., -1:, :])


GOOD = inputs((3, (2,), 4, 5, 6, 7), 0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dq": 1.0}, TypeError, r"dz::attention_difference: dq must be a tensor, got float"),
        (dict.fromkeys(MOVES), ValueError, r"dq, dk or dv must be given, got None for all"),
        ({"dq": GOOD["dq"].long()}, TypeError, r"dq must be of a floating-point dtype, got int64"),
        ({"dk": GOOD["dk"].bfloat16()}, TypeError, r"dk must be float32, got bfloat16"),
        ({"q": GOOD["q"].double()}, TypeError, r"q must be float32, got float64"),
        ({"p": GOOD["p"].to("meta")}, ValueError, r"p must be on cpu like dq, got meta"),
        ({"dv": GOOD["dv"].to("meta")}, ValueError, r"dv must be on cpu like dq, got meta"),
        ({"q": GOOD["q"][0]}, ValueError, r"q must be of shape \[B, T, D\] or \[N, H, T, D\], got \[4, 6\]"),
        ({"k": GOOD["k"][:1]}, ValueError, r"k must be of shape \[B, S, D\] = \[2, \*, 6\], got \[1, 5, 6\]"),
        ({"v": GOOD["v"][:, 1:]}, ValueError, r"v must be of shape \[B, S, E\] = \[2, 5, \*\], got \[2, 4, 7\]"),
        ({"p": GOOD["p"].mT}, ValueError, r"p must be of shape \[B, T, S\] = \[2, 4, 5\], got \[2, 5, 4\]"),
        (
            {"dk": GOOD["dk"][:1]},
            ValueError,
            r"dk must be of shape \[P, B, S, D\] = \[3, 2, 5, 6\], got \[1, 2, 5, 6\]",
        ),
        ({"dq": GOOD["dq"][0]}, ValueError, r"dq must be of shape \[P, B, T, D\] = \[\*, 2, 4, 6\], got \[2, 4, 6\]"),
        (
            {"k": GOOD["k"][:, :0], "v": GOOD["v"][:, :0], "p": GOOD["p"][..., :0]},
            ValueError,
            r"k must be non-empty in S and D, got \[2, 0, 6\]",
        ),
        ({"out_dtype": torch.int8}, TypeError, r"out_dtype must be a floating-point dtype, got torch.int8"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.attention_difference(**{**GOOD, **change})
