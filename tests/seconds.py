"""CPU seconds of every test file: ``pytest -n 2 tests --seconds FILE`` writes a table.

Of the process and of those that it started and waited for, so other work on the machine shows little. A fixture or a
cache that several tests share is counted where it was made.
"""

from __future__ import annotations

import collections
import csv
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


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
