"""docs/kernels.md, run: from a tree without any C++ kernel to a new op whose test passes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OP = "relu_difference"
TREE = ("csrc", "dzkernels", "python", "docs", "tests", "setup.py", "pyproject.toml", "README.md")


def files_of(page: str) -> dict[str, str]:
    """Path -> text of the files that the page shows: a heading names the file, the first block after it is its text."""
    shown = re.findall(r"^## [^\n]*`([^`\n]+/[^`\n]+)`\n.*?^```\w+\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return {path.replace("<op>", OP): text for path, text in shown}


@pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="no C++ compiler")
def test_the_page_makes_a_kernel(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    files, tree = files_of(page), tmp_path / "tree"
    assert list(files) == [
        f"dzkernels/ops/{OP}.py",
        f"dzkernels/reference/{OP}.py",
        f"csrc/cpu/{OP}.cpp",
        f"tests/ops/cases/{OP}.py",
    ]
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "figures")
    for name in TREE:
        source = ROOT / name
        shutil.copytree(source, tree / name, ignore=ignored) if source.is_dir() else shutil.copy(source, tree / name)
    for kernel in (tree / "csrc" / "cpu").glob("*.cpp"):  # compiling the others would prove nothing here
        if kernel.stem != "dispatch":
            kernel.unlink()
    for path, text in files.items():
        assert not (tree / path).exists(), f"{path} is there already: the page must make a file of its own"
        (tree / path).write_text(text, encoding="utf-8")

    def run(command: str) -> str:
        ran = subprocess.run(command.split(), cwd=tree, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, f"{command}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
        return ran.stdout

    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "python")]),
        "DZ_CUDA": "0",
    }
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    build, lists, test = (line.split("#")[0].strip().replace("<op>", OP) for line in commands.splitlines())
    run(build)
    run(lists)
    assert re.search(rf"^\| `{OP}` \| float32 \|", (tree / "docs" / "gpu.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"import {OP} as {OP}" in (tree / "dzkernels" / "__init__.pyi").read_text(encoding="utf-8")
    passed = re.search(r"\b(\d+) passed", run(f"{test} -p no:cacheprovider"))
    assert passed is not None
    assert int(passed[1]) == 2, "the kernel passes on its cases, and a wrong one does not"
