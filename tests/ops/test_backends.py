"""Choosing a backend: an explicit choice runs or raises, the automatic one explains itself."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dzkernels
from dzkernels import backends
from dzkernels.backends import implementation
from ops.table import CASES, check


def run(dtype: torch.dtype = torch.float32) -> Tensor:
    one = torch.ones(1, 1, 3, 3, dtype=dtype)
    return dzkernels.channel_conv2d(one, torch.zeros(1, dtype=torch.int64), one)


def chosen(dtype: torch.dtype = torch.float32) -> str:
    return backends.choose("channel_conv2d", torch.device("cpu"), dtype)


@pytest.fixture(autouse=True)
def _fresh_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_logged", set())


def test_cpu_tensors_run_on_the_cpu_kernels_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert run().item() == 9
    assert chosen() == "cpu"
    assert not caplog.records


def test_float64_asks_for_the_reference_and_needs_no_excuse(caplog: pytest.LogCaptureFixture) -> None:
    assert run(torch.float64).dtype == torch.float64
    assert not caplog.records


def test_a_fallback_is_logged_once_per_op_with_the_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends._load, "native_error", lambda: "the build was interrupted")
    with caplog.at_level(logging.WARNING, logger="dzkernels"):
        run()
        run()
        dzkernels.conv2d_tap(
            torch.ones(1, 1, 1, 1), torch.zeros(1, 4, dtype=torch.int64), torch.ones(1), kernel=1, out_channels=1
        )
    reason = "because better ones cannot (cpu: the build was interrupted)"
    assert [record.getMessage() for record in caplog.records] == [
        f"dz::channel_conv2d runs on backend 'reference' {reason}",
        f"dz::conv2d_tap runs on backend 'reference' {reason}",
    ]


def test_forcing_by_environment_and_by_block(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("DZ_BACKEND", "reference")
    assert chosen() == "reference"
    with dzkernels.use_backend("cpu"):
        assert chosen() == "cpu"
        with dzkernels.use_backend("reference"):
            assert chosen() == "reference"
        assert chosen() == "cpu"
    assert chosen() == "reference"
    assert run().item() == 9
    assert not caplog.records


def test_a_forced_backend_that_cannot_run_raises() -> None:
    with (
        dzkernels.use_backend("cpu"),
        pytest.raises(
            dzkernels.BackendError,
            match=r"dz::channel_conv2d: backend 'cpu' was requested but its kernels are float32, "
            r"the tensors are float64\. Available here: .*cpu, reference",
        ),
    ):
        run(torch.float64)
    with (
        dzkernels.use_backend("cuda"),
        pytest.raises(dzkernels.BackendError, match=r"backend 'cuda' was requested but the tensors are on cpu"),
    ):
        run()


def test_a_backend_without_the_op_says_so() -> None:
    if backends.has_kernel("cuda", "gelu_difference"):
        pytest.fail("there is one now: test another op here")
    with (
        dzkernels.use_backend("cuda"),
        pytest.raises(
            dzkernels.BackendError, match="backend 'cuda' was requested but it has no kernel for gelu_difference"
        ),
    ):
        dzkernels.gelu_difference(torch.zeros(1, 1), torch.zeros(1))


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="use_backend: name must be one of cuda, triton, cpu, reference, got 'tpu'"),
        dzkernels.use_backend("tpu"),
    ):
        pass
    monkeypatch.setenv("DZ_BACKEND", "gpu")
    with pytest.raises(ValueError, match="DZ_BACKEND must be one of cuda, triton, cpu, reference, got 'gpu'"):
        run()


def test_available_backends_are_in_order_and_end_with_the_reference() -> None:
    names = dzkernels.available_backends()
    assert list(names) == [name for name in dzkernels.BACKENDS if name in names]
    assert names[-2:] == ("cpu", "reference")


def test_triton_without_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    device = torch.device("cuda", 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    backends._has_compiler.cache_clear()
    try:
        with (
            dzkernels.use_backend("triton"),
            pytest.raises(dzkernels.BackendError, match="'triton' was requested but triton finds no C compiler"),
        ):
            backends.choose("conv2d_tap", device, torch.float32)
        backends._has_compiler.cache_clear()
        monkeypatch.setenv("CC", "cc")
        assert backends._refuse_triton(device, torch.float32) is None
    finally:
        backends._has_compiler.cache_clear()


def test_cuda_tensors_fall_back_in_order(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without a GPU only the choice can be tested: refusals are stubbed, the order and the message are real."""
    device = torch.device("cuda", 0)
    monkeypatch.setitem(backends._REFUSALS, "cuda", lambda device, dtype: "no driver")
    monkeypatch.setitem(backends._REFUSALS, "triton", lambda device, dtype: None)
    with caplog.at_level(logging.WARNING, logger="dzkernels"):
        assert backends.choose("dense_batch_norm", device, torch.float32) == "triton"  # none in CUDA, and none missed
        assert backends.choose("conv2d_tap", device, torch.float32) == "triton"
        monkeypatch.setitem(backends._REFUSALS, "triton", lambda device, dtype: "no compiler")
        assert backends.choose("channel_batch_norm", device, torch.float32) == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "dz::conv2d_tap runs on backend 'triton' because better ones cannot (cuda: no driver)",
        "dz::channel_batch_norm runs on backend 'reference' because better ones cannot "
        "(cuda: no driver; triton: no compiler)",
    ]
    monkeypatch.setitem(backends._REFUSALS, "cuda", lambda device, dtype: None)
    assert backends.choose("conv2d_tap", device, torch.float32) == "cuda"


def test_the_tensor_core_kernel_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(dtype: torch.dtype) -> str:
        return backends.choose("dense_conv2d", torch.device("cuda", 0), dtype)

    with dzkernels.use_backend("cuda"):
        monkeypatch.setattr(backends._load, "cuda_error", lambda: None)
        assert choose(torch.float32) == choose(torch.bfloat16) == "cuda"
        with pytest.raises(dzkernels.BackendError, match="'cuda' was requested but its kernels are float32"):
            choose(torch.float16)
        monkeypatch.setattr(backends._load, "cuda_error", lambda: "dzkernels was built without CUDA (DZ_CUDA=0)")
        with pytest.raises(dzkernels.BackendError, match="'cuda' was requested but dzkernels was built without CUDA"):
            choose(torch.bfloat16)


@pytest.mark.parametrize("op", CASES)
def test_the_table_of_cases_holds_for_the_cpu_kernels(op: str) -> None:
    for case in CASES[op]():
        check(op, case, "cpu", "cpu")


@pytest.mark.parametrize("op", CASES)
def test_a_wrong_kernel_does_not_pass(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(backend: str, op: str) -> Callable[..., Tensor]:
        kernel = implementation(backend, op)
        return kernel if backend == "reference" else lambda *args, **kwargs: kernel(*args, **kwargs) * (1 + 2.0**-5)

    monkeypatch.setattr(backends, "implementation", wrong)
    case = next(case for case in CASES[op]() if "P=2" in case.id or case.bound is not None)
    with pytest.raises(AssertionError, match=r"not equal|out of bounds"):
        check(op, case, "cpu", "cpu")


@pytest.mark.parametrize("left_out", ["dq", "dk", "dv", "all"])
def test_an_attention_without_one_of_its_changes_does_not_pass(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(backend: str, op: str) -> Callable[..., Tensor]:
        kernel = implementation(backend, op)

        def without(delta: Tensor, weight: Tensor, q: Tensor, *rest: Any, **options: Any) -> Tensor:
            inner, weight = q.shape[-1], weight.clone()
            features = {"dq": slice(inner), "dk": slice(inner, 2 * inner), "dv": slice(2 * inner, None)}
            weight[:, features.get(left_out, slice(None))] = 0.0
            return kernel(delta, weight, q, *rest, **options)

        return kernel if backend == "reference" else without

    monkeypatch.setattr(backends, "implementation", wrong)
    for case in CASES["self_attention_difference"]():
        if case.args["q"].shape[2] > 1:  # the softmax of a single token stands still
            with pytest.raises(AssertionError, match="out of bounds"):
                check("self_attention_difference", case, "cpu", "cpu")


@pytest.mark.parametrize("op", ["dense_conv2d", "batch_norm_conv2d"])
def test_wrong_moments_do_not_pass(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(backend: str, op: str) -> Callable[..., Any]:
        kernel = implementation(backend, op)

        def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            out, moments = kernel(*args, **kwargs)
            return out, moments * (1 + 2.0**-10)

        return run

    monkeypatch.setattr(backends, "implementation", wrong)
    case = next(case for case in CASES[op]() if "next_zc" in case.args and case.args["delta"].numel() > 1)
    with pytest.raises(AssertionError, match="out of bounds"):
        check(op, case, "cpu", "cpu")


def test_a_convolution_alone_is_pytorchs_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Until a GPU has measured them: ours run where they are asked for, Triton's to leave moments; nothing is said."""
    device = torch.device("cuda", 0)
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends._REFUSALS, name, lambda device, dtype: None)
    with caplog.at_level(logging.WARNING, logger="dzkernels"):
        assert backends.choose("dense_conv2d", device, torch.float32) == "reference"
        for name in ("cuda", "triton"):
            with dzkernels.use_backend(name):
                assert backends.choose("dense_conv2d", device, torch.float32) == name
        assert backends.choose("dense_conv2d", device, torch.float32, moments=True) == "triton"
    assert not caplog.records
    monkeypatch.setitem(backends._REFUSALS, "triton", lambda device, dtype: "no compiler")
    with caplog.at_level(logging.WARNING, logger="dzkernels"):
        assert backends.choose("dense_conv2d", device, torch.float32, moments=True) == "reference"
    assert "runs on backend 'reference' because better ones cannot (triton: no compiler)" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_in_the_interpreter() -> None:
    """In a process of its own: triton decides at import whether to interpret."""
    script = Path(__file__).with_name("interpret_triton.py")
    environ = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script)], env=environ, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all equal\n")
