"""Every op of dzkernels alone, on shapes of the works, beside what the machine can do at most.

    python -m benchmarks.kernels [--op NAME,...] [--threads 1] [--no-gate]

The calls are those of timed() in tests/ops/cases/<op>.py. Rates are of CPU time, best of several calls, with freed
memory kept. Traffic counts every input and result once, arithmetic counts products only.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import dzkernels

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from ops.calls import Timed

from . import machine
from .throughput import RESULTS, gated, parser, record

KEY = ("op", "case", "isa", "threads")


def timed(op: str) -> Iterator[Timed]:
    """The calls of an op; not every op has some."""
    return getattr(importlib.import_module(f"ops.cases.{op}"), "timed", lambda: iter(()))()


def traffic(arguments: Any, result: Tensor) -> int:
    """Bytes of all tensors in and out, once each."""
    tensors = [t for t in pytree.tree_leaves((arguments, result)) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(op: str, call: Timed, tops: dict[str, float]) -> dict[str, str]:
    torch.manual_seed(0)
    function = getattr(dzkernels, op)
    arguments, options = call.make()
    moved = traffic((arguments, options), function(*arguments, **options))
    with dzkernels.use_backend("reference" if call.torch else None):
        calls = machine.rate(lambda: function(*arguments, **options), 1.0)
    flops, bandwidth = call.flops * calls, moved * calls
    return {
        "op": op,
        "case": call.case,
        "us": f"{1e6 / calls:.4g}",
        "gflops": f"{flops / 1e9:.4g}" if flops else "",
        "of_float32_peak": f"{flops / tops['float32_flops']:.3f}" if flops else "",
        "gbs": f"{bandwidth / 1e9:.4g}",
        "of_memory_copy": f"{bandwidth / tops['memory_bytes']:.3f}",
        "mib": f"{moved / 2**20:.4g}",
        "peak_float32_gflops": f"{tops['float32_flops'] / 1e9:.4g}",
        "peak_bfloat16_gflops": f"{tops['bfloat16_flops'] / 1e9:.4g}",
        "copy_cache_gbs": f"{tops['cache_bytes'] / 1e9:.4g}",
        "copy_memory_gbs": f"{tops['memory_bytes'] / 1e9:.4g}",
    }


def path() -> Path:
    return RESULTS / f"kernels-{machine.slug()}.csv"


def main() -> None:
    arguments = parser("Every op of dzkernels alone, beside what the machine can do at most.")
    arguments.add_argument("--op", default="", help="ops to measure, by commas (all)")
    options = arguments.parse_args()
    wanted = options.op.split(",") if options.op else list(dzkernels.OPS)
    gated(options)
    dzkernels.keep_freed_memory()
    tops = machine.ceilings()
    print({name: f"{value / 1e9:.4g}e9/s" for name, value in tops.items()})
    rows, failed = [], []
    for op in wanted:
        calls = list(timed(op))
        if not calls:
            print(f"no call of {op}: add timed() to tests/ops/cases/{op}.py")
        for call in calls:
            try:
                row = measure(op, call, tops)
            except Exception:  # one op that does not run keeps no other from being measured
                failed.append(f"{op} ({call.case}): {traceback.format_exc(limit=1)}")
                continue
            rows.append(row | machine.facts(options.threads) | {"gate": options.gate})
            arithmetic = f"{row['gflops']} GFLOP/s, " if row["gflops"] else ""
            print(f"  {op:25} {call.case:34} {row['us']:>9} us  {arithmetic}{row['gbs']} GB/s", flush=True)
    record(path(), rows, KEY)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
