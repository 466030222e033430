"""Every op's kernels on its cases (cases/<op>.py) against the reference, and that no wrong kernel passes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dzkernels import backends
from dzkernels._op import DECLARED
from dzkernels.backends import implementation
from ops.table import CASES, check


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


@pytest.mark.parametrize("op", [op for op in CASES if any(arg.name == "next_zc" for arg in DECLARED[op].args)])
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


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(900)
def test_triton_kernels_in_the_interpreter() -> None:
    """In a process of its own: triton decides at import whether to interpret."""
    script = Path(__file__).with_name("interpret_triton.py")
    environ = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script)], env=environ, capture_output=True, text=True, timeout=840, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all equal\n")
