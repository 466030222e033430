"""Strictness for every test: warnings are errors, one thread, no network of implicit settings."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

# What third parties emit, each with its source. Ours are errors.
THIRD_PARTY_WARNINGS: tuple[str, ...] = (
    "ignore:In the future `np.object` will be defined:FutureWarning",  # tensorboard
    "ignore:.*torch.jit.*:DeprecationWarning",  # torch, from inside torch.export and torch.utils.tensorboard
    "ignore:.*isinstance\\(treespec, LeafSpec\\) is deprecated.*:FutureWarning",  # torch.export
    "ignore:.*Pandas4Warning.*:DeprecationWarning",  # mlxtend
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_thread_and_no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test starts from one thread and from the automatic choices, whatever ran before it."""
    torch.set_num_threads(1)
    if "PYTEST_KEEP_DZ" not in os.environ:
        for name in ("DZ_BACKEND", "TRITON_INTERPRET"):
            monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(1)
