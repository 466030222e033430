"""What the machine can do at most, measured here and now, and what it is called."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import deepzero as dz
import dzkernels

ROOT = Path(__file__).resolve().parents[1]


def spent(function: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """CPU seconds of this process in one call; on a GPU wall seconds until the GPU is done."""
    if torch.device(device).type == "cpu":
        began = time.process_time()
        function()
        return time.process_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def rate(function: Callable[[], Any], work: float, seconds: float = 0.3, device: torch.device | str = "cpu") -> float:
    """``work`` per second of the best of at least three calls, after one to warm up."""
    function()
    best, total, calls = float("inf"), 0.0, 0
    while calls < 3 or total < seconds:
        once = spent(function, device)
        best, total, calls = min(best, once), total + once, calls + 1
    return work / best


def matmul_peak(dtype: torch.dtype, size: int = 1024, device: torch.device | str = "cpu") -> float:
    """FLOP/s of torch.mm on random values."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty(size, size, dtype=dtype, device=device)
    return rate(lambda: torch.mm(a, b, out=out), 2.0 * size**3, device=device)


def copy_bandwidth(size: int, device: torch.device | str = "cpu") -> float:
    """Bytes read and written per second by a copy between two buffers of ``size`` bytes."""
    a, b = torch.randn(2, size // 4, device=device)
    repeats = max(1, (1 << 24) // size)

    def copies() -> None:
        for _ in range(repeats):
            b.copy_(a)

    return rate(copies, 2.0 * size * repeats, device=device)


def ceilings() -> dict[str, float]:
    return {
        "float32_flops": matmul_peak(torch.float32),
        "bfloat16_flops": matmul_peak(torch.bfloat16),
        "cache_bytes": copy_bandwidth(512 << 10),
        "memory_bytes": copy_bandwidth(256 << 20),
    }


def gpu_ceilings() -> dict[str, float]:
    """As :func:`ceilings`, for the current GPU, at sizes that fill it; products in float32 without TF32."""
    return {
        "float32_flops": matmul_peak(torch.float32, 8192, "cuda"),
        "bfloat16_flops": matmul_peak(torch.bfloat16, 8192, "cuda"),
        "memory_bytes": copy_bandwidth(1 << 30, "cuda"),
    }


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def slug() -> str:
    """The CPU's name as a file name, with the instruction set level of our kernels."""
    name = re.sub(r"\((R|TM|tm|r)\)", "", cpu_name())
    level = dzkernels.build_info()["isa"] or "reference"
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {level}".lower()).strip("-")


def commit(tree: Path = ROOT) -> str:
    """The commit of the checkout that is measured, with a mark when the code differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=tree, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "python", "dzkernels", "csrc", "setup.py")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else "")


def facts(threads: int) -> dict[str, str]:
    return {
        "commit": commit(),
        "deepzero": dz.__version__,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "isa": dzkernels.build_info()["isa"] or "reference",
        "threads": str(threads),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "date": time.strftime("%Y-%m-%d"),
    }
