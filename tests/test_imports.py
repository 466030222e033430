"""The house has floors, and imports point down: no circle, at run time or for types, whatever is imported first."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import deepzero
import dzkernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"deepzero": Path(deepzero.__file__).parent, "dzkernels": Path(dzkernels.__file__).parent}

# Top floor first; the same list stands in CONTRIBUTING.md. What shares a floor may not import each other.
FLOORS = (
    "__main__",
    "cli",
    "report",
    "training",
    "sparsity",
    "baselines",
    "estimators",
    "engine",
    "evaluator",
    "execute",
    "plan",
    "fusion",
    "rules",
    "block",
    "base_pass",
    "graph",
    "surroundings",
    "blackbox objective device",
    "carriers state text data models",
    "errors",
)


def modules(folders: dict[str, Path]) -> dict[str, Path]:
    """Dotted name -> file; a package's name stands for its face, ``__init__.py``, a stub for its native module."""
    found = {}
    for package, folder in folders.items():
        for path in folder.rglob("*.py*"):
            if path.suffix not in (".py", ".pyi"):
                continue
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that one file names in any import, inside functions and for types too, with their faces."""
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                targets.add(inner if inner in known else module)
    # importing a.b.c runs a and a.b first; those around the importing file are running already
    around = {".".join(name.split(".")[:k]) for k in range(1, name.count(".") + 1)}
    faces = {".".join(t.split(".")[:k]) for t in targets for k in range(1, t.count(".") + 2)}
    return {t for t in faces if t in known and t not in around and t != name} | (targets & set(known) - {name})


def graph(folders: dict[str, Path]) -> dict[str, set[str]]:
    known = modules(folders)
    return {name: imports_of(name, path, known) for name, path in known.items()}


def circles(arrows: dict[str, set[str]]) -> Iterator[list[str]]:
    """The sets of modules that reach each other, and modules that a file inside them imports back."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = arrows[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    reached = {name: reach(name) for name in arrows}
    told: set[str] = set()
    for name in sorted(arrows):
        circle = {other for other in reached[name] if name in reached[other]}
        if circle and name not in told:
            told |= circle
            yield sorted(circle)


def floor(module: str) -> int:
    part = module.split(".")[1]
    return next(k for k, names in enumerate(FLOORS) if part in names.split())


def test_no_circle() -> None:
    assert list(circles(graph(PACKAGES))) == []


def test_every_arrow_points_down() -> None:
    up = [
        f"{name} -> {target}"
        for name, targets in graph(PACKAGES).items()
        for target in targets
        if name.count(".") and target.startswith("deepzero.") and name.startswith("deepzero.")
        if name.split(".")[1] != target.split(".")[1] and floor(name) >= floor(target)
    ]
    assert up == []


def test_kernels_know_no_modules() -> None:
    assert [
        n for n, targets in graph(PACKAGES).items() if n.startswith("dzkernels") for t in targets if "deepzero" in t
    ] == []


def test_the_floors_are_those_of_the_page() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert " -> ".join(names.replace(" ", ", ") for names in FLOORS[1:]) in " ".join(page.split())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "from . import b", "b": "from .a import x"}, [["p.a", "p.b"]]),
        ({"a": "def f():\n    from .b import x", "b": "if TYPE_CHECKING:\n    from .a import x"}, [["p.a", "p.b"]]),
        ({"a": "from .b import x", "b": ""}, []),
        ({"a": "from .q.c import x", "q/__init__": "from .d import y", "q/c": "", "q/d": "from ..a import z"},
         [["p.a", "p.q", "p.q.d"]]),
    ],
    ids=["plain", "late and typing", "none", "through a face"],
)  # fmt: skip
def test_a_circle_is_seen(tmp_path: Path, files: dict[str, str], expected: list[list[str]]) -> None:
    for name, text in {"__init__": "", **files}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    assert list(circles(graph({"p": tmp_path}))) == expected


REVERSED = r"""
import ast, os, sys
import torch, torch.export, numpy
from pathlib import Path

def reverse(path):
    lines = path.read_text().split("\n")
    spans = [(n.lineno - 1, n.end_lineno) for n in ast.parse(path.read_text()).body
             if isinstance(n, (ast.Import, ast.ImportFrom)) and getattr(n, "module", "") != "__future__"]
    blocks = [lines[a:b] for a, b in spans]
    for (a, b), block in reversed(list(zip(spans, reversed(blocks)))):
        lines[a:b] = block
    path.write_text("\n".join(lines))

for face in map(Path, sys.argv[1:]):
    child = os.fork()
    if child == 0:
        before = face.read_text()
        reverse(face)
        try:
            assert face.read_text() != before or before.count("import ") == 1, "nothing was reversed"
            import deepzero.cli
        except BaseException as error:
            print(face, type(error).__name__, error, flush=True)
            os._exit(1)
        finally:
            face.write_text(before)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_no_order_of_import_lines_matters(tmp_path: Path) -> None:
    """Each ``__init__`` imports with its import lines reversed."""
    for package, folder in PACKAGES.items():
        shutil.copytree(folder, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "_cuda*"))
    faces = [
        str(path) for path in tmp_path.rglob("__init__.py") if re.search("^(from|import) ", path.read_text(), re.M)
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", REVERSED, *faces], env=environment, capture_output=True, text=True, check=True
    )
    assert len(faces) > 8
    assert ran.stdout == ""
