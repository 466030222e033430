"""Every example, as a user runs it: a process of its own, and closing numbers that improved."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

GAIN = {"train_loop": 0.5, "huggingface": 0.2, "sign_network": 0.1, "black_box": 0.02}
"""Example -> least gain of test accuracy from its line "before" to its line "after" at small size."""


@functools.cache
def run(name: str, *interpreter: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "DEEPZERO_EXAMPLE_SMALL": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    return subprocess.run(
        [sys.executable, *interpreter, str(ROOT / "examples" / f"{name}.py")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_every_example_is_listed() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(GAIN)


@pytest.mark.parametrize("name", GAIN)
def test_example_trains(name: str) -> None:
    if name == "huggingface" and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install 'deepzero[hf]'")
    done = run(name)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(before|after): test accuracy (\d\.\d+)", done.stdout, re.MULTILINE))
    assert float(found["after"]) - float(found["before"]) >= GAIN[name], done.stdout
    assert re.search(r"[1-9][\d,]* queries", done.stdout), done.stdout


def test_sign_network_shows_that_autograd_sees_nothing() -> None:
    shown = run("sign_network").stdout
    assert "autograd: 0 of 1,536 gradients of the first layer are not zero" in shown
    count = re.search(r"deepzero: ([\d,]+) of 1,536", shown)
    assert count is not None
    assert int(count[1].replace(",", "")) > 1000


def test_huggingface_example_says_what_is_missing() -> None:
    hide = "import sys; sys.modules['transformers'] = None; import runpy; runpy.run_path(sys.argv[1])"
    done = run("huggingface", "-c", hide)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "this example needs transformers: pip install transformers"
