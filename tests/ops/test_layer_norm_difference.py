"""layer_norm_difference is the change of layer norm, group norm or RMS norm when its input moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dzkernels
from helpers import RUNNERS, UNIT, assert_bounded, assert_exact, normal, running, strided
from ops.cases.layer_norm_difference import EPS, SHAPES, inputs, norm, size

U = UNIT[torch.float32]


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int, int], scale: float, centre: bool) -> None:
    """At most eight float32 additions a lane, six roundings of what is added, and the same again for s' (halved), then
    four of the result: 16 in all. The reference is itself held against running the norm twice in float64."""
    args = inputs(shape, scale, centre)
    wide = {**args, "delta": args["delta"].double(), "zc": args["zc"].double()}
    wanted = dzkernels.layer_norm_difference(**wide)
    for runner in RUNNERS:
        with running(runner):
            got = dzkernels.layer_norm_difference(**args)
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        assert_bounded(got, wanted, 16 * U * size(args))
    # The base input is rounded, so the variance of zc is off by a rounding from `var`: held against its own here.
    zc = wide["zc"] - wide["zc"].mean(1, keepdim=True) if centre else wide["zc"]
    own = {**wide, "zc": zc, "var": zc.square().mean(1)}
    rerun = norm(zc + wide["delta"], args) - norm(zc, args)
    lost = 64 * UNIT[torch.float64] * (1 + zc.abs().amax() + wide["delta"].abs().amax()) / EPS**0.5
    assert_bounded(dzkernels.layer_norm_difference(**own), rerun, lost * (1 + args["gamma"].double().abs()) + 0 * rerun)


@pytest.mark.parametrize("runner", RUNNERS)
def test_small_changes_keep_their_digits(runner: str) -> None:
    """Linear in a step of 1e-9, where a rerun has no digits left."""
    args = inputs((4, 3, 97), 2.0**-30)
    with running(runner):
        small = dzkernels.layer_norm_difference(**args)
        smaller = dzkernels.layer_norm_difference(**{**args, "delta": args["delta"] / 2})
    assert_bounded(small, 2 * smaller.double(), (32 * U + 2.0**-28) * size(args))


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("runner", RUNNERS)
def test_one_moving_element(runner: str, centre: bool) -> None:
    """What one weight does: a single element moves, the others move by the mean alone, and keep all their digits."""
    args = inputs((6, 1, 768), 1.0, centre)
    args["delta"] = torch.zeros(6, 1, 768)
    for p, at in enumerate((0, 1, 15, 16, 400, 767)):
        args["delta"][p, 0, at] = 10.0 ** -(p + 1)
    wanted = dzkernels.layer_norm_difference(**{**args, "delta": args["delta"].double(), "zc": args["zc"].double()})
    with running(runner):
        assert_bounded(dzkernels.layer_norm_difference(**args), wanted, 16 * U * size(args))


@pytest.mark.parametrize("value", [0.1, -7.3, 1e-9, 1e6])
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_constant_change_does_nothing(runner: str, value: float) -> None:
    args = inputs((2, 3, 97), 1.0)
    with running(runner):
        got = dzkernels.layer_norm_difference(**{**args, "delta": torch.full((2, 3, 97), value)})
    assert_bounded(got, torch.zeros(2, 3, 97), 4 * U**2 * abs(value) / EPS**0.5)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("left", [0.25, 2.0**-6, 2.0**-12])
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_vanishing_variance(runner: str, left: float, centre: bool) -> None:
    """delta = (left - 1) zc leaves `left` of the spread: var + dvar cancels, the new variance must not."""
    args = inputs((2, 4, 96), 1.0, centre)
    args["delta"] = (args["zc"] * (left - 1)).expand(2, -1, -1).contiguous()
    wanted = dzkernels.layer_norm_difference(**{**args, "delta": args["delta"].double(), "zc": args["zc"].double()})
    # zc + d is rounded to float32 where its square is taken: u / left of what is left, twice over for centred rows.
    with running(runner):
        assert_bounded(dzkernels.layer_norm_difference(**args), wanted, (16 + 4 / left) * U * size(args))


@pytest.mark.parametrize("runner", RUNNERS)
def test_group_norm_by_rows(runner: str) -> None:
    """Rows are (sample, group); the weight of the channels is left to the caller."""
    x, delta = normal(2, 6, 5, 5, seed=1, dtype=torch.float64), normal(3, 2, 6, 5, 5, seed=2) * 0.1
    rows = x.reshape(4, 75)
    zc = rows - rows.mean(1, keepdim=True)
    with running(runner):
        got = dzkernels.layer_norm_difference(delta.reshape(3, 4, 75), zc.float(), zc.square().mean(1), eps=EPS)
    wanted = torch.stack([F.group_norm(x + d, 2) - F.group_norm(x, 2) for d in delta.double()])
    assert_bounded(got.reshape(3, 2, 6, 5, 5), wanted, 32 * U * wanted.abs().amax())


@pytest.mark.parametrize("runner", RUNNERS)
def test_nan_stays_in_its_row(runner: str) -> None:
    args = inputs((2, 3, 20), 1.0)
    args["delta"][1, 2, 7] = float("nan")
    with running(runner):
        got = dzkernels.layer_norm_difference(**args)
    assert got[1, 2].isnan().all()
    assert int(got.isnan().sum()) == 20


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("runner", RUNNERS)
def test_bfloat16_in_and_out(runner: str, shape: tuple[int, int, int], centre: bool, weighted: bool) -> None:
    """As in float32, with the result rounded once."""
    args = inputs(shape, 0.5, centre)
    if not weighted:
        args["gamma"] = None
    half = {**args, "delta": args["delta"].bfloat16()}
    args["delta"] = half["delta"].float()
    with running(runner):
        wide = dzkernels.layer_norm_difference(**args)
        for given in (half, args):
            for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
                got = dzkernels.layer_norm_difference(**given, out_dtype=out_dtype)
                if runner != "reference":  # which rounds from float64
                    assert_exact(got, wide.to(out_dtype))
                assert got.is_contiguous()
                rounding = UNIT[out_dtype] if out_dtype != torch.float32 else 0.0
                tiny = torch.finfo(out_dtype).smallest_normal * rounding
                assert_bounded(got, wide, rounding * wide.double().abs() + 32 * U * size(args) + tiny)
        assert dzkernels.layer_norm_difference(**half).dtype == torch.bfloat16


@pytest.mark.parametrize("runner", RUNNERS)
def test_bfloat16_nan_stays_in_its_row(runner: str) -> None:
    args = inputs((2, 3, 20), 1.0)
    args["delta"][1, 2, 7] = float("nan")
    with running(runner):
        got = dzkernels.layer_norm_difference(**{**args, "delta": args["delta"].bfloat16()})
    assert got[1, 2].isnan().all()
    assert int(got.isnan().sum()) == 20


@pytest.mark.parametrize("runner", RUNNERS)
def test_odd_memory_gamma_and_empty(runner: str) -> None:
    args = inputs((3, 4, 35), 0.5)
    with running(runner):
        wanted = dzkernels.layer_norm_difference(**args)
        odd = {name: strided(v) if isinstance(v, Tensor) else v for name, v in args.items()}
        assert_exact(dzkernels.layer_norm_difference(**odd), wanted)
        turned = {**args, "delta": args["delta"].transpose(0, 2).contiguous().transpose(0, 2)}
        assert_exact(dzkernels.layer_norm_difference(**turned), wanted)
        wide = dzkernels.layer_norm_difference(**{**args, "gamma": args["gamma"].double()})
        assert_exact(wide, wanted)
        ones = dzkernels.layer_norm_difference(**{**args, "gamma": torch.ones(35)})
        assert_exact(dzkernels.layer_norm_difference(**{**args, "gamma": None}), ones)
        assert dzkernels.layer_norm_difference(**{**args, "delta": args["delta"][:0]}).shape == (0, 4, 35)
        none = {**args, "delta": args["delta"][:, :0], "zc": args["zc"][:0], "var": args["var"][:0]}
        assert dzkernels.layer_norm_difference(**none).shape == (3, 0, 35)


@pytest.mark.parametrize("shape", [(3, 7, 96), (1, 200, 50), (2, 1, 9001)])
def test_threads_and_neighbours_do_not_matter(shape: tuple[int, int, int]) -> None:
    args = inputs(shape, 1.0)
    wanted = dzkernels.layer_norm_difference(**args)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_exact(dzkernels.layer_norm_difference(**args), wanted)
        halves = {**args, "delta": args["delta"].bfloat16()}
        exact = dzkernels.layer_norm_difference(**{**args, "delta": halves["delta"].float()})
        assert_exact(dzkernels.layer_norm_difference(**halves), exact.bfloat16())
    last = {**args, "delta": args["delta"][:, -1:], "zc": args["zc"][-1:], "var": args["var"][-1:]}
    assert_exact(dzkernels.layer_norm_difference(**last), wanted[:, -1:])


GOOD = inputs((3, 2, 5), 1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": 1.0}, TypeError, r"dz::layer_norm_difference: delta must be a tensor, got float"),
        ({"delta": GOOD["delta"].int()}, TypeError, r"delta must be of a floating-point dtype, got int32"),
        ({"delta": GOOD["delta"][0]}, ValueError, r"delta must be of shape \[P, R, M\], got \[2, 5\]"),
        ({"delta": torch.zeros(3, 2, 0)}, ValueError, r"delta must be non-empty in M, got \[3, 2, 0\]"),
        ({"zc": GOOD["zc"].double()}, TypeError, r"zc must be float32, got float64"),
        ({"zc": GOOD["zc"][:1]}, ValueError, r"zc must be of shape \[R, M\] = \[2, 5\], got \[1, 5\]"),
        ({"zc": GOOD["zc"].to("meta")}, ValueError, r"zc must be on cpu like delta, got meta"),
        ({"var": GOOD["var"].float()}, TypeError, r"var must be float64, got float32"),
        ({"var": GOOD["var"][:1]}, ValueError, r"var must be of shape \[R\] = \[2\], got \[1\]"),
        ({"var": GOOD["var"].to("meta")}, ValueError, r"var must be on cpu like delta, got meta"),
        ({"gamma": GOOD["gamma"].half()}, TypeError, r"gamma must be float32 or float64, got float16"),
        ({"gamma": GOOD["gamma"][:3]}, ValueError, r"gamma must be of shape \[M\] = \[5\], got \[3\]"),
        ({"gamma": GOOD["gamma"].to("meta")}, ValueError, r"gamma must be on cpu like delta, got meta"),
        ({"out_dtype": torch.int64}, TypeError, r"out_dtype must be a floating-point dtype, got torch.int64"),
        ({"eps": -1.0}, ValueError, r"eps must be at least 0, got -1.0"),
        ({"eps": float("nan")}, ValueError, r"eps must be at least 0, got nan"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.layer_norm_difference(**{**GOOD, **change})
