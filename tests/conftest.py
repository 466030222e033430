"""Strictness for every test: warnings are errors, one thread, no network of implicit settings. The quick tier and the
table of seconds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from seconds import CpuSeconds
from tiers import quick

# What third parties emit, each with its source. Ours are errors.
THIRD_PARTY_WARNINGS: tuple[str, ...] = (
    "ignore:In the future `np.object` will be defined:FutureWarning",  # tensorboard
    "ignore:.*torch.jit.*:DeprecationWarning",  # torch, from inside torch.export and torch.utils.tensorboard
    "ignore:.*isinstance\\(treespec, LeafSpec\\) is deprecated.*:FutureWarning",  # torch.export
    "ignore:.*Pandas4Warning.*:DeprecationWarning",  # mlxtend
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", metavar="FILE", help="write the CPU seconds of every test file")


def pytest_configure(config: pytest.Config) -> None:
    if (table := config.getoption("seconds")) is not None:
        config.pluginmanager.register(CpuSeconds(Path(table)))
    config.addinivalue_line("filterwarnings", "error")
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in quick(items):
        item.add_marker("quick")


@pytest.fixture(autouse=True)
def _one_thread_and_no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test starts from one thread and from the automatic choices, whatever ran before it."""
    torch.set_num_threads(1)
    if "PYTEST_KEEP_DZ" not in os.environ:
        for name in ("DZ_BACKEND", "TRITON_INTERPRET"):
            monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(1)
