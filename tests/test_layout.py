"""One op, one stem: every op has the same file in every place where it must have one, and nothing else lies there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import dzkernels
from dzkernels._op import DECLARED
from dzkernels.backends import BACKENDS
from dzkernels.ops import __main__ as made
from tiers import QUICK, TESTS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(dzkernels.__file__).parent

SHARED = {"common", "compile_all", "warp"}  # and what begins with an underscore


def stems(folder: Path, suffix: str) -> set[str]:
    return {path.stem for path in folder.glob(f"*{suffix}") if not path.stem.startswith("_")} - SHARED


def launches(op: str) -> bool:
    """Whether the op has a C++ kernel that its file in dzkernels/cpu starts: it may be made of other ops instead."""
    return hasattr(importlib.import_module(f"dzkernels.cpu.{op}"), "launch")


def test_every_op_has_a_reference_and_no_folder_holds_anything_else() -> None:
    assert stems(PACKAGE / "reference", ".py") == set(dzkernels.OPS)
    assert stems(PACKAGE / "cpu", ".py") <= set(dzkernels.OPS)


def test_cpu_sources_and_cases() -> None:
    kernels = {op for op in dzkernels.OPS if DECLARED[op].kernels["cpu"].result or launches(op)}
    assert stems(ROOT / "csrc" / "cpu", ".cpp") - {"dispatch"} == kernels
    assert stems(ROOT / "tests" / "ops" / "cases", ".py") == set(dzkernels.OPS)


def test_triton_and_cuda_files_are_ops() -> None:
    assert stems(PACKAGE / "triton", ".py") <= set(dzkernels.OPS)
    cuda = stems(ROOT / "csrc" / "cuda", ".cuh")
    assert stems(PACKAGE / "cuda", ".py") == cuda <= set(dzkernels.OPS)


def test_what_is_made_from_the_declarations_is_up_to_date() -> None:
    """Else run python -m dzkernels.ops."""
    assert made.STUB.read_text(encoding="utf-8") == made.stub()
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")  # made.PAGE is not there where dzkernels is installed
    assert made.table() in page
    assert made.page(page) == page


@pytest.mark.parametrize("op", dzkernels.OPS)
def test_a_declaration_names_the_kernels_and_arguments_that_there_are(op: str) -> None:
    declared, function = DECLARED[op], getattr(dzkernels, op)
    files = {backend for backend in BACKENDS if (PACKAGE / backend / f"{op}.py").exists()}
    assert files == {"reference", *(backend for backend, kernel in declared.kernels.items() if not kernel.result)}
    names = set(inspect.signature(function).parameters)
    assert {arg.name.split(".")[0] for arg in declared.args} <= names
    for arg in declared.args:
        assert arg.below in ("", *(dim for other in declared.args for dim in other.dims.split(", ")))


@pytest.mark.parametrize("op", dzkernels.OPS)
def test_an_op_is_public_has_a_contract_and_one_signature(op: str) -> None:
    function = getattr(dzkernels, op)
    assert op in dzkernels.__all__
    for part in ("result", "Exactness:"):
        assert part in (function.__doc__ or ""), f"the contract of {op} does not say {part!r}"
    signatures = {
        backend: str(inspect.signature(importlib.import_module(f"dzkernels.{backend}.{op}").run))
        for backend in ("reference", "cpu", "cuda", "triton")
        if (PACKAGE / backend / f"{op}.py").exists()
        and (backend != "triton" or importlib.util.find_spec("triton") is not None)
    }
    assert len({text.replace("Size", "tuple[int, int]") for text in signatures.values()}) == 1, signatures


def test_imports_point_one_way() -> None:
    """deepzero -> dzkernels -> dzkernels._C; no framework header in csrc."""
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) deepzero", path.read_text(), re.M), path
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include <(torch|ATen|c10)", path.read_text()), path


def test_no_test_imports_another() -> None:
    """What two test modules share stands in a module that holds no test."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert Path(__file__) in files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for part in ".".join([module, *names]).split("."):
                assert not part.startswith("test_"), f"{path}:{node.lineno} imports {part}"


def test_every_package_has_quick_tests() -> None:
    places = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    assert places <= QUICK.keys()
    for place in QUICK:
        assert (TESTS / place).exists(), f"{place} is no test file or folder"
