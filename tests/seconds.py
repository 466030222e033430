"""CPU seconds of every test file: ``pytest -n 2 tests --seconds FILE`` writes a table.

Of the process and of those that it started and waited for, so other work on the machine shows little. A fixture or a
cache that several tests share is counted where it was made.

``python tests/seconds.py OLD NEW`` says what has changed between two tables.
"""

from __future__ import annotations

import collections
import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def read(path: Path) -> dict[str, float]:
    """Test file -> CPU seconds."""
    with path.open(newline="") as lines:
        return {row["file"]: float(row["cpu_seconds"]) for row in csv.DictReader(lines)}


def changes(old: dict[str, float], new: dict[str, float], most: int = 10) -> str:
    """The files whose time has changed most, and the sums."""
    by = sorted(old.keys() | new.keys(), key=lambda file: -abs(new.get(file, 0.0) - old.get(file, 0.0)))
    lines = [f"{old.get(file, 0.0):8.1f} -> {new.get(file, 0.0):8.1f}  {file}" for file in by[:most]]
    total = f"{sum(old.values()):8.1f} -> {sum(new.values()):8.1f}  CPU seconds in all"
    return "\n".join([*lines, total])


def _spent() -> float:
    return sum(os.times()[:4])


class CpuSeconds:
    """Times every test where it runs, and adds up where the reports arrive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = _spent()
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.tests: dict[str, set[str]] = collections.defaultdict(set)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report = yield
        now = _spent()
        report.cpu_seconds, self.last = now - self.last, now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.split("::")[0]
        self.seconds[file] += report.cpu_seconds
        self.tests[file].add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        with self.path.open("w", newline="") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(("file", "tests", "cpu_seconds"))
            for file in sorted(self.seconds):
                writer.writerow((file, len(self.tests[file]), f"{self.seconds[file]:.1f}"))


if __name__ == "__main__":
    print(changes(*(read(Path(path)) for path in sys.argv[1:3])))
