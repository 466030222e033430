"""The Triton kernels compile for GPUs, fit and do not spill, without a GPU: aot_triton.py in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dzkernels
from dzkernels import backends

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.timeout(900),
]

SCRIPT = Path(__file__).with_name("aot_triton.py")


def run(cache: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    return subprocess.run(
        [sys.executable, *args], env=environ, capture_output=True, text=True, timeout=840, check=False
    )


def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    result = run(tmp_path, str(SCRIPT))
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


def test_spills_and_forgotten_kernels_are_refused(tmp_path: Path) -> None:
    """A kernel that is given too few registers; and a table without rows."""
    spilling = """
import aot_triton
launches = aot_triton.launches
def crowded(op, call):
    return [aot_triton.dataclasses.replace(launch, options={"maxnreg": 32}) for launch in launches(op, call)]
aot_triton.launches, aot_triton.CAPABILITIES = crowded, (90,)
aot_triton.main(["erf bf16"])
"""
    result = run(tmp_path, "-c", spilling)
    assert result.returncode != 0
    assert re.search(r"spills in a hot kernel, or more shared memory than there is:\n\w+ +erf bf16", result.stderr)
    result = run(tmp_path, "-c", "import aot_triton; aot_triton.CALLS.clear(); aot_triton.main([])")
    assert result.returncode != 0
    assert re.search(r"no call of compiled\(\) launches .*\b\w+\._kernel\b", result.stderr)
    for op in dzkernels.OPS:
        assert (op in result.stderr) == backends.has_kernel("triton", op)
