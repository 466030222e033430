"""Runs the Triton kernels on CPU tensors (TRITON_INTERPRET=1) against the reference: the table in cases.py.

Started by test_backends.py in a process of its own; by hand with the names of ops: python interpret_triton.py gelu_...
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dzkernels import OPS, backends
from dzkernels.triton import _config
from ops.cases import CASES, check


def main() -> None:
    turn = itertools.count()
    os.environ["DZ_TUNE"] = "1"  # each launch takes the next configuration: none of them may move a bit
    _config._choose = lambda name, shape, configs, run: configs[next(turn) % len(configs)]
    for op in sys.argv[1:] or [op for op in OPS if backends.has_kernel("triton", op)]:
        started, count = time.perf_counter(), 0
        for case in CASES[op]():
            if case.large:
                continue
            try:
                check(op, case, "triton", "cpu")
            except Exception as error:
                raise AssertionError(f"{op}, case {case.id!r}: {error}") from error
            count += 1
        assert count, f"{op} has no case small enough for the interpreter"
        print(f"{op}: {count} cases in {time.perf_counter() - started:.1f} s")
    print("all equal")


if __name__ == "__main__":
    main()
