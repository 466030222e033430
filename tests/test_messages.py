"""What the messages of all packages share."""

from __future__ import annotations

from pathlib import Path

import pytest

import deepzero
from deepzero.errors import did_you_mean


@pytest.mark.parametrize(
    ("name", "known", "otherwise", "hint"),
    [
        ("0.wieght", ["0.bias", "0.weight"], "", " Did you mean '0.weight'?"),
        ("0.wieght", {"0.weight": 1}, "Parameters are: 0.weight.", " Did you mean '0.weight'?"),
        ("scale", ["0.bias", "0.weight"], "", ""),
        ("scale", ["0.bias"], "Parameters are: 0.bias.", " Parameters are: 0.bias."),
        ("scale", [], "", ""),
    ],
)
def test_the_closest_known_name_is_suggested(name, known, otherwise, hint):
    assert did_you_mean(name, known, otherwise) == hint


def test_one_function_suggests_names():
    sources = Path(deepzero.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if "difflib" in path.read_text(encoding="utf-8")] == ["errors.py"]
