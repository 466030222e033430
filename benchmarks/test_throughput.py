"""The race under pytest-benchmark, one contender after another in this process: a quick look while working on a kernel.

Published numbers come from ``python -m benchmarks.throughput``, which interleaves the contenders.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import WORKS, build, sample
from benchmarks.peers import CONTENDERS


@pytest.mark.parametrize(
    "key", [key for key in CONTENDERS if key[1] in ("ours", "plain loop", "block reuse")], ids="-".join
)
@pytest.mark.parametrize("name", WORKS)
def test_round(benchmark: Any, name: str, key: tuple[str, str, str]) -> None:
    torch.set_num_threads(1)
    case = build(WORKS[name])
    contender = CONTENDERS[key](case, sample(case, WORKS[name].sample))
    contender.first()
    contender.settle(1.0)
    seconds = benchmark.pedantic(contender.round, rounds=3)
    if seconds is not None:
        benchmark.extra_info["cpu_us_per_query"] = 1e6 * seconds
