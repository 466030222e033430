"""python -m dzkernels.ops: writes the committed files that are derived from the declarations.

dzkernels/__init__.pyi  the exports of dzkernels, for type checkers
docs/gpu.md             the table of kernels
"""

from __future__ import annotations

import re
from pathlib import Path

import dzkernels

from .._op import DECLARED
from . import OPS

ROOT = Path(__file__).parents[2]
STUB = ROOT / "dzkernels" / "__init__.pyi"
PAGE = ROOT / "docs" / "gpu.md"

COLUMNS = {"CPU": "cpu", "Triton": "triton", "CUDA C++": "cuda"}
TABLE = re.compile(rf"^\| op \| {re.escape(' | '.join(COLUMNS))} \|\n(?:\|.*\n)+", re.MULTILINE)


def stub() -> str:
    """`from .<module> import <name> as <name>` for everything that dzkernels exports."""
    where = {"OPS": "ops", "BACKENDS": "backends", **{op: f"ops.{op}" for op in OPS}}
    modules = {
        name: where.get(name) or vars(dzkernels)[name].__module__.partition(".")[2]
        for name in vars(dzkernels)["__all__"]
    }
    lines = sorted(f"from .{module} import {name} as {name}" for name, module in modules.items())
    return "\n".join(["# Made by python -m dzkernels.ops.", "from . import backends as backends", *lines]) + "\n"


def table() -> str:
    lines = [f"| op | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    lines += [f"| `{op}` |{''.join(_cell(op, backend) for backend in COLUMNS.values())}" for op in OPS]
    return "\n".join(lines) + "\n"


def _cell(op: str, backend: str) -> str:
    kernel = DECLARED[op].kernels.get(backend)
    if kernel is None:
        return " |"
    more = [str(dtype).removeprefix("torch.") for dtype in kernel.dtypes] + ["on request"] * kernel.on_request
    return f" {', '.join(['float32', *more])}{f': {kernel.note}' if kernel.note else ''} |"


def page(text: str) -> str:
    """The page with its table of kernels regenerated."""
    return TABLE.sub(lambda _: table(), text)


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
