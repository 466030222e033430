"""The kernels on a GPU against the reference on the CPU: the table of cases. Skipped where torch sees no GPU."""

from __future__ import annotations

import pytest
import torch

from dzkernels import backends
from ops.table import CASES, check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", CASES)
def test_is_the_reference(op: str, backend: str) -> None:
    if not backends.has_kernel(backend, op):
        pytest.skip(f"{backend} has no kernel for {op}")
    for case in CASES[op]():
        try:
            check(op, case, backend, "cuda")
        except Exception as error:
            raise AssertionError(f"case {case.id!r}: {error}") from error


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees one GPU")
@pytest.mark.parametrize("op", CASES)
def test_runs_where_its_tensors_are(op: str) -> None:
    """The current device is another one."""
    if not any(backends.has_kernel(name, op) for name in ("triton", "cuda")):
        pytest.skip(f"no backend of a GPU has a kernel for {op}")
    for case in CASES[op]():
        if not case.large:
            check(op, case, "triton" if backends.has_kernel("triton", op) else "cuda", "cuda:1")
