"""dense_conv2d is torch's convolution, in tiles where that is faster."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dzkernels
from helpers import RUNNERS, assert_bounded, assert_exact, normal, running, small_ints, strided
from ops.cases.dense_conv2d import SHAPES, by_torch, geometry, in_tiles, operands, roundings
from ops.moments import centred, moments_by_rerun

ROOT = Path(__file__).resolve().parents[2]
by_cuda = importlib.import_module("dzkernels.cuda.dense_conv2d")


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_random_data_is_within_its_roundings(shape: tuple[Any, ...], runner: str, layout: str) -> None:
    delta, weight = operands(shape, normal)
    wanted, bound = by_torch(delta, weight, shape), roundings(delta, weight, shape)
    if layout == "channels_last":
        delta = delta.movedim(2, -1).contiguous().movedim(-1, 2)
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        delta, weight = strided(delta), strided(weight)
    with running(runner):
        got = dzkernels.dense_conv2d(delta, weight, **geometry(shape))
    assert got.permute(0, 1, 3, 4, 2).is_contiguous()
    assert_bounded(got, wanted, bound)


def test_tiles_are_the_convolution() -> None:
    """What the bound above is made of, in float64: its own check."""
    shape = SHAPES[1].values[0]
    delta, weight = operands(shape, normal)
    torch.testing.assert_close(in_tiles(delta, weight, shape, magnitudes=False), by_torch(delta, weight, shape))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_plain_sums(shape: tuple[Any, ...], dtype: torch.dtype, runner: str) -> None:
    """Exact on small integers, but for the one rounding of a bfloat16 result."""
    delta, weight = operands(shape, small_ints)
    wanted = by_torch(delta, weight, shape)
    with running("reference" if dtype is torch.float64 else runner):
        got = dzkernels.dense_conv2d(delta.to(dtype), weight.to(dtype), **geometry(shape))
    assert got.permute(0, 1, 3, 4, 2).is_contiguous()
    assert_exact(got, wanted.to(dtype))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_moments_are_of_the_result(shape: tuple[Any, ...], dtype: torch.dtype, mean: float, runner: str) -> None:
    delta, weight = (t.to(dtype) for t in operands(shape, normal))
    delta = delta + mean
    with running(runner):
        alone = dzkernels.dense_conv2d(delta, weight, **geometry(shape))
        zc = centred(*alone.shape[1:])
        got, moments = dzkernels.dense_conv2d(delta, weight, **geometry(shape), next_zc=zc)
    assert_exact(got, alone)
    assert moments.dtype == torch.float64
    assert_bounded(moments, *moments_by_rerun(got, zc))


def test_moments_in_float64() -> None:
    delta, weight = operands(SHAPES[0].values[0], functools.partial(normal, dtype=torch.float64))
    zc = normal(2, 16, 6, 6, seed=3, dtype=torch.float64)
    got, moments = dzkernels.dense_conv2d(delta * 1e-7, weight, next_zc=zc - zc.mean((0, 2, 3), keepdim=True))
    wanted, _ = moments_by_rerun(got, zc - zc.mean((0, 2, 3), keepdim=True))
    assert_bounded(moments, wanted, 1e-14)


@pytest.mark.parametrize("runner", RUNNERS)
def test_no_perturbation(runner: str) -> None:
    with running(runner):
        got = dzkernels.dense_conv2d(torch.ones(0, 2, 16, 5, 5), torch.ones(20, 16, 3, 3))
        assert got.shape == (0, 2, 20, 3, 3)
        zc = torch.ones(2, 20, 3, 3)
        got, moments = dzkernels.dense_conv2d(torch.ones(0, 2, 16, 5, 5), torch.ones(20, 16, 3, 3), next_zc=zc)
    assert (got.shape, moments.shape, moments.dtype) == ((0, 2, 20, 3, 3), (0, 2, 20), torch.float64)


@pytest.mark.parametrize("runner", [runner for runner in RUNNERS if runner != "reference"])
def test_threads_and_company_do_not_matter(runner: str) -> None:
    """An image's result depends neither on the number of threads nor on the images in its chunk."""
    delta, weight = normal(5, 7, 18, 9, 9, seed=1), normal(20, 18, 3, 3, seed=2)
    with running(runner):
        wanted = dzkernels.dense_conv2d(delta, weight, padding=1)
        torch.set_num_threads(3)
        assert_exact(dzkernels.dense_conv2d(delta, weight, padding=1), wanted)
        assert_exact(dzkernels.dense_conv2d(delta[3:4, 2:5], weight, padding=1), wanted[3:4, 2:5])


@pytest.mark.parametrize("runner", RUNNERS)
def test_nan_stays_in_its_image(runner: str) -> None:
    delta = torch.zeros(1, 3, 16, 8, 8)
    delta[0, 1, 3, 0, 0] = float("nan")
    with running(runner):
        got = dzkernels.dense_conv2d(delta, torch.ones(16, 16, 3, 3), padding=1)
    assert got[0, 1, :, :2, :2].isnan().all()
    assert_exact(got[0, ::2], torch.zeros(2, 16, 8, 8))


# --- the CUDA kernel's launcher, without a GPU: csrc/tests has the kernel


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of launches, which do nothing here; the device is an A100."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(by_cuda, "launch", lambda *args: calls.append(args))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return calls


def run_cuda(delta: Tensor, weight: Tensor, **options: Any) -> Any:
    plain = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "next_zc": None}
    return by_cuda.run(delta, weight, **(plain | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "misaligned"])
def test_what_the_cuda_kernel_is_given(dtype: torch.dtype, layout: str, launched: list[tuple[Any, ...]]) -> None:
    delta, weight = small_ints(3, 2, 16, 9, 8, seed=1, dtype=dtype), small_ints(48, 16, 3, 3, seed=2, dtype=dtype)
    wanted = delta.permute(0, 1, 3, 4, 2).contiguous(), weight.permute(0, 2, 3, 1).contiguous()
    if layout == "strided":
        delta, weight = strided(delta), strided(weight)
    elif layout == "misaligned":
        holder = torch.zeros(delta.numel() + 1, dtype=dtype)
        delta = holder[1:].view(wanted[0].shape).copy_(wanted[0]).permute(0, 1, 4, 2, 3)
        assert delta.permute(0, 1, 3, 4, 2).is_contiguous()
    out = run_cuda(delta, weight, stride=(2, 1), padding=(0, 3))
    (module, images, turned, result, *sizes), = launched  # fmt: skip
    assert module == by_cuda.__name__
    for tensor, same in ((images, wanted[0]), (turned, wanted[1])):
        assert_exact(tensor, same)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0
    assert out.shape == (3, 2, 48, 4, 12)
    assert result.data_ptr() == out.data_ptr()
    assert out.permute(0, 1, 3, 4, 2).is_contiguous()
    assert sizes == [int(dtype is torch.bfloat16), 6, 9, 8, 16, 4, 12, 48, 2, 1, 0, 3]
    source = (ROOT / "csrc" / "cuda" / "dense_conv2d.cuh").read_text()
    declared = re.search(r"dz_dense_conv2d\(([^)]*)\)", source)
    assert declared is not None
    names = re.findall(r"(?:void\*|int64_t) (\w+)", declared.group(1))
    assert " ".join(names) == "delta weight out half images H W C Ho Wo O stride_h stride_w pad_h pad_w"


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            (16, 5, 5, 16, 2, 2),
            {},
            r"3x3 weights and strides of 1 or 2, without dilation or groups, got 2x2",
        ),
        ((16, 9, 9, 16, 3, 3), {"stride": (1, 3)}, r"got 3x3, stride=\(1, 3\), dilation=\(1, 1\), groups=1"),
        ((16, 9, 9, 16, 3, 3), {"dilation": (2, 1)}, r"dilation=\(2, 1\), groups=1"),
        ((32, 5, 5, 16, 3, 3), {"groups": 2}, "groups=2"),
        ((18, 5, 5, 16, 3, 3), {}, "multiples of 16 channels, of float32 at most 128 in, got 18 in and 16 out"),
        ((16, 5, 5, 24, 3, 3), {}, "got 16 in and 24 out"),
        ((144, 5, 5, 16, 3, 3), {}, "at most 128 in, got 144 in and 16 out"),
    ],
)
def test_what_the_cuda_kernel_refuses(
    shape: tuple[int, ...], options: dict[str, Any], message: str, launched: list[tuple[Any, ...]]
) -> None:
    channels, height, width, outs, *kernel = shape
    weight = torch.zeros(outs, channels // options.get("groups", 1), *kernel)
    with pytest.raises(dzkernels.BackendError, match=f"dz::dense_conv2d: backend 'cuda' was requested but .*{message}"):
        run_cuda(torch.zeros(1, 2, channels, height, width), weight, **options)
    assert not launched


def test_the_cuda_kernel_refuses_older_gpus(monkeypatch: pytest.MonkeyPatch, launched: list[tuple[Any, ...]]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(dzkernels.BackendError, match=r"its kernel needs compute capability 8\.0, cpu has 7\.5"):
        run_cuda(torch.zeros(1, 2, 16, 5, 5), torch.zeros(16, 16, 3, 3))
    assert not launched


GOOD: dict[str, Any] = {"delta": torch.zeros(3, 2, 4, 5, 5), "weight": torch.zeros(6, 2, 3, 3), "groups": 2}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": None}, TypeError, r"dz::dense_conv2d: delta must be a tensor, got NoneType"),
        ({"delta": torch.zeros(3, 5, 5)}, ValueError, r"delta must be of shape \[P, N, C, H, W\], got \[3, 5, 5\]"),
        ({"delta": torch.zeros(3, 2, 5, 5, 5)}, ValueError, r"delta must have groups \* Cg = 4 channels, got 5"),
        ({"weight": torch.zeros(6, 2, 3, 3).double()}, TypeError, r"weight must be float32, got float64"),
        ({"weight": torch.zeros(6, 2, 3)}, ValueError, r"weight must be of shape \[O, Cg, kh, kw\], got \[6, 2, 3\]"),
        ({"weight": torch.zeros(6, 2, 3, 3, device="meta")}, ValueError, r"weight must be on cpu like delta, got meta"),
        ({"stride": (1, 0)}, ValueError, r"stride must be one or two integers of at least 1, got \(1, 0\)"),
        ({"padding": -1}, ValueError, r"padding must be one or two integers of at least 0, got -1"),
        ({"dilation": 0}, ValueError, r"dilation must be one or two integers of at least 1, got 0"),
        ({"groups": 4}, ValueError, r"groups must divide the 6 rows of weight, got 4"),
        (
            {"next_zc": torch.zeros(2, 6, 3, 2)},
            ValueError,
            r"next_zc must be of shape \[N, O, Ho, Wo\] = \[2, 6, 3, 3\], got \[2, 6, 3, 2\]",
        ),
        ({"next_zc": torch.zeros(2, 6, 3, 3).double()}, TypeError, r"next_zc must be float32, got float64"),
        ({"next_zc": torch.zeros(2, 6, 3, 3, device="meta")}, ValueError, r"next_zc must be on cpu like delta, got"),
        (
            {"delta": torch.zeros(3, 0, 4, 5, 5), "next_zc": torch.zeros(0, 6, 3, 3)},
            ValueError,
            r"next_zc must be non-empty in N, O, Ho and Wo, got \[0, 6, 3, 3\]",
        ),
        ({"dilation": 3}, ValueError, r"kernel must be at most the padded input \[5, 5\], got \[3, 3\] with dilation"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dzkernels.dense_conv2d(**{**GOOD, **change})
