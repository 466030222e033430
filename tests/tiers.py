"""Which tests are quick: ``pytest -m quick`` runs a sample of every package in well under a minute on two cores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

# File or folder of tests -> every how many of its tests are quick. A file of its own is left out of its folder's count;
# 0 is none: what starts processes, compiles, runs whole models, or needs a library that the tests can do without.
QUICK = {
    "test_helpers.py": 1,
    "test_judge.py": 1,
    "test_messages.py": 1,
    "test_kernels_page.py": 0,
    "test_imports.py": 1,
    "test_layout.py": 1,
    "test_docs.py": 0,
    "test_build.py": 10,
    "test_examples.py": 0,
    "baselines": 20,
    "benchmarks": 14,
    "capture": 4,
    "cli": 11,
    "data": 4,
    "estimators": 20,
    "exactness/test_huggingface.py": 0,
    "exactness/test_fused_convolutions.py": 0,
    "exactness": 60,
    "fusion": 4,
    "models": 4,
    "plan": 8,
    "ops/test_cases.py": 25,
    "ops/test_aot.py": 0,
    "ops/test_aot_cuda.py": 0,
    "ops/test_record.py": 0,
    "ops": 40,
    "rules/test_integers.py": 7,
    "rules": 40,
    "sparsity": 14,
    "state": 6,
    "training": 30,
}


def quick(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """The sample, in order. Known from the order of the tests alone, so every process of a run picks the same."""
    seen = dict.fromkeys(QUICK, 0)
    for item in items:
        place = item.path.relative_to(TESTS).as_posix()
        key = place if place in QUICK else place.split("/")[0]
        every = QUICK.get(key, 0)
        if every:
            if seen[key] % every == 0:
                yield item
            seen[key] += 1
