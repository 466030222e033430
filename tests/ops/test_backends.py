"""Choosing a backend: an explicit choice runs or raises, the automatic one explains itself."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dzkernels
from dzkernels import _op, backends
from dzkernels._op import BFLOAT16, LEAD, Arg, Kernel, Op


def run(dtype: torch.dtype = torch.float32) -> Tensor:
    return dzkernels.softmax_difference(torch.zeros(1, 1, 2, dtype=dtype), torch.full((1, 2), 0.5, dtype=dtype))


def chosen(dtype: torch.dtype = torch.float32) -> str:
    return backends.choose("softmax_difference", torch.device("cpu"), dtype)


@pytest.fixture(autouse=True)
def _fresh_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_logged", set())


@pytest.fixture(autouse=True)
def _declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops of which only the choice matters."""
    monkeypatch.setattr(_op, "DECLARED", _op.DECLARED.copy())
    delta = Arg("delta", "P", LEAD)
    Op("everywhere", delta, cpu=Kernel(), triton=Kernel(), cuda=Kernel())
    Op("not_in_cuda", delta, cpu=Kernel(), triton=Kernel())
    waived = Kernel(BFLOAT16, on_request=True)
    Op("on_request", delta, cpu=Kernel(), triton=replace(waived, with_moments=True), cuda=waived)


def test_cpu_tensors_run_on_the_cpu_kernels_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert not run().any()
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
        backends.choose("everywhere", torch.device("cpu"), torch.float32)
    reason = "because better ones cannot (cpu: the build was interrupted)"
    assert [record.getMessage() for record in caplog.records] == [
        f"dz::softmax_difference runs on backend 'reference' {reason}",
        f"dz::everywhere runs on backend 'reference' {reason}",
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
    assert not run().any()
    assert not caplog.records


def test_a_forced_backend_that_cannot_run_raises() -> None:
    with (
        dzkernels.use_backend("cpu"),
        pytest.raises(
            dzkernels.BackendError,
            match=r"dz::softmax_difference: backend 'cpu' was requested but its kernels are float32, "
            r"the tensors are float64\. Available here: .*cpu, reference",
        ),
    ):
        run(torch.float64)
    with (
        dzkernels.use_backend("cuda"),
        pytest.raises(dzkernels.BackendError, match=r"backend 'cuda' was requested but the tensors are on cpu"),
    ):
        backends.choose("everywhere", torch.device("cpu"), torch.float32)


def test_a_backend_without_the_op_says_so() -> None:
    message = "dz::not_in_cuda: backend 'cuda' was requested but it has no kernel for not_in_cuda"
    with dzkernels.use_backend("cuda"), pytest.raises(dzkernels.BackendError, match=message):
        backends.choose("not_in_cuda", torch.device("cpu"), torch.float32)


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
            backends.choose("everywhere", device, torch.float32)
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
        assert backends.choose("not_in_cuda", device, torch.float32) == "triton"  # none in CUDA, and none missed
        assert backends.choose("everywhere", device, torch.float32) == "triton"
        monkeypatch.setitem(backends._REFUSALS, "triton", lambda device, dtype: "no compiler")
        assert backends.choose("everywhere", device, torch.float32) == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "dz::everywhere runs on backend 'triton' because better ones cannot (cuda: no driver)",
        "dz::everywhere runs on backend 'reference' because better ones cannot (cuda: no driver; triton: no compiler)",
    ]
    monkeypatch.setitem(backends._REFUSALS, "cuda", lambda device, dtype: None)
    assert backends.choose("everywhere", device, torch.float32) == "cuda"


def test_the_tensor_core_kernel_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(dtype: torch.dtype) -> str:
        return backends.choose("on_request", torch.device("cuda", 0), dtype)

    with dzkernels.use_backend("cuda"):
        monkeypatch.setattr(backends._load, "cuda_error", lambda: None)
        assert choose(torch.float32) == choose(torch.bfloat16) == "cuda"
        with pytest.raises(dzkernels.BackendError, match="'cuda' was requested but its kernels are float32"):
            choose(torch.float16)
        monkeypatch.setattr(backends._load, "cuda_error", lambda: "dzkernels was built without CUDA (DZ_CUDA=0)")
        with pytest.raises(dzkernels.BackendError, match="'cuda' was requested but dzkernels was built without CUDA"):
            choose(torch.bfloat16)


def test_a_convolution_alone_is_pytorchs_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Until a GPU has measured them: ours run where they are asked for, Triton's to leave moments; nothing is said."""
    device = torch.device("cuda", 0)
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends._REFUSALS, name, lambda device, dtype: None)
    with caplog.at_level(logging.WARNING, logger="dzkernels"):
        assert backends.choose("on_request", device, torch.float32) == "reference"
        for name in ("cuda", "triton"):
            with dzkernels.use_backend(name):
                assert backends.choose("on_request", device, torch.float32) == name
        assert backends.choose("on_request", device, torch.float32, moments=True) == "triton"
    assert not caplog.records
    monkeypatch.setitem(backends._REFUSALS, "triton", lambda device, dtype: "no compiler")
    with caplog.at_level(logging.WARNING, logger="dzkernels"):
        assert backends.choose("on_request", device, torch.float32, moments=True) == "reference"
    assert "runs on backend 'reference' because better ones cannot (triton: no compiler)" in caplog.text
