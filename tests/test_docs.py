"""The pages are true: their Python runs, their paths, options and names exist, their numbers are the committed ones."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import deepzero
from deepzero.rules import RULES
from rules import cases

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?<![\w./-])((?:\.ci|benchmarks|csrc|docs|dzkernels|examples|python|tests)/[\w./*<>-]*[\w/>])")


def identity(page: Path) -> str:
    return page.name


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


pages = pytest.mark.parametrize("page", PAGES, ids=identity)


# The files of docs/kernels.md are run by test_kernels_page.py.
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and p.stem != "kernels"], ids=identity)
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """All blocks of a page, in order, in one process."""
    script = tmp_path / "page.py"
    extra = "\nassert report.ok and not report.fallbacks, report\n" if page.stem == "extending" else ""
    script.write_text("\n".join(blocks(page, "python")) + extra, encoding="utf-8")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *(p for p in sys.path if p)]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:deepzero", str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


@pages
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    missing += [path for path in PATH.findall(text) if not list(ROOT.glob(re.sub("<.*?>", "*", path)))]
    assert not missing


@pages
def test_no_path_of_one_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w.])/(home|root|tmp|opt|work|usr)/", page.read_text(encoding="utf-8"))


@pages
def test_names_exist(page: Path) -> None:
    """Everything written as ``dz.a.b`` or ``deepzero.a.b`` can be reached."""
    for dotted in re.findall(r"\b(?:dz|deepzero)\.([A-Za-z_][\w.]*\w)", page.read_text(encoding="utf-8")):
        found: object = deepzero
        for name in dotted.split("."):
            if isinstance(found, ModuleType) and not hasattr(found, name):
                importlib.import_module(f"{found.__name__}.{name}")
            assert hasattr(found, name), f"{page.name}: deepzero.{dotted}"
            found = getattr(found, name)


@pages
def test_commands_exist(page: Path) -> None:
    """Subcommands, options and configuration keys of every ``deepzero ...`` that a page shows."""
    typer = pytest.importorskip("typer")
    from deepzero.cli import app
    from deepzero.training.config import load_config

    commands = typer.main.get_command(app).commands
    text = page.read_text(encoding="utf-8")
    shown = [line for kind, code in FENCE.findall(text) if kind == "sh" for line in code.splitlines()]
    shown += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for line in shown:
        for command, rest in re.findall(r"(?:^|/|\s)deepzero ([a-z]+)([^&|;#]*)", line):
            assert command in commands, line
            options = {name for p in commands[command].params for name in p.opts} | {"--help"}
            assert set(re.findall(r"(?<!\S)(--[a-z-]+)", rest)) <= options, line
            load_config(None, re.findall(r"--set (\S+)", rest))


@pages
def test_configurations_load(page: Path, tmp_path: Path) -> None:
    from deepzero.training.build import build_trainer, prepare
    from deepzero.training.config import load_config

    for text in blocks(page, "toml"):
        (tmp_path / "run.toml").write_text(text, encoding="utf-8")
        config = load_config(tmp_path / "run.toml")
        build_trainer(config, prepare(config), tmp_path)


@pytest.mark.parametrize(("extra", "then"), [("train", "deepzero train"), ("test", "pytest -n 2 tests")])
def test_readme_has_the_two_commands_as_one_line_each(extra: str, then: str) -> None:
    install = f"python3 -m venv .venv && .venv/bin/pip install -c constraints-cpu.txt '.[{extra}]'"
    assert f"{install} && .venv/bin/{then}\n" in blocks(ROOT / "README.md", "sh")


def test_readme_example_is_about_ten_lines() -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 14


def test_a_new_rule_takes_ten_lines() -> None:
    """With its row, as the page writes them: these lines alone register the rule and the row."""
    rule, row, *_ = blocks(ROOT / "docs" / "extending.md", "python")
    assert len([line for line in (rule + row).splitlines() if line.strip()]) <= 10
    for block, table in ((rule, RULES), (row, cases.ROWS)):
        kept = table.copy()
        try:
            exec(block, {})
            assert len(table) == len(kept) + 1
        finally:
            table.clear()
            table.update(kept) if isinstance(table, dict) else table.extend(kept)


def test_costs_are_the_committed_rows() -> None:
    location = importlib.util.spec_from_file_location("costs", ROOT / "benchmarks" / "costs.py")
    assert location is not None
    assert location.loader is not None
    costs = importlib.util.module_from_spec(location)
    location.loader.exec_module(costs)
    with open(costs.OUTPUT, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == set(costs.CASES)
    for page, tables in costs.PAGES.items():
        for columns in tables:
            assert costs.table(rows, columns) in page.read_text(encoding="utf-8"), f"{page}: run benchmarks/costs.py"
    assert any(row["pays_after_estimates"] == "never" for row in rows), "docs/costs.md names a case where we lose"


def test_readme_quotes_committed_numbers() -> None:
    """Every number of the results section is a cell of the file that its table names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("<!-- results") : text.index("<!-- end of results")]
    found = r"((?:^\|.*\n)+)(?:\n|<!--[^\n]*-->)*\nFrom \[[^\]]*\]\((benchmarks/results/[\w.-]+\.csv)\)"
    tables = re.findall(found, section, re.MULTILINE)
    assert len(tables) == section.count("| --- |"), "a table without its source"
    assert tables
    for table, source in tables:
        with open(ROOT / source, encoding="utf-8", newline="") as file:
            cells = {cell for row in csv.reader(file) for cell in row}
        for line in table.splitlines()[2:]:
            for cell in (c.strip() for c in line.strip("|").split("|")):
                assert cell in cells, f"{cell!r} is not in {source}"
