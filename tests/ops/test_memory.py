"""keep_freed_memory() ends the page faults of large fresh tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dzkernels


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_large_buffers_are_reused(tmp_path: Path) -> None:
    code = """
import resource, torch, dzkernels
torch.set_num_threads(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(1 << 23).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert dzkernels.keep_freed_memory() is True
faults()  # the first round grows the process
print(faults())
"""
    paths = {"PYTHONPATH": str(Path(dzkernels.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=paths, timeout=120, check=False
    )
    # Ten fresh buffers of 32 MiB would be 160 with huge pages and 81,920 without.
    assert int(result.stdout) < 100, result.stderr
