"""Loss and gradients do not depend on the number of threads, bit for bit."""

from __future__ import annotations

import pytest
import torch

import deepzero as dz
from benchmarks import cases
from helpers import assert_exact

BATCH = {"W1": 16, "W2": 2, "W3": 64, "W4": 2}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BATCH)
def test_any_number_of_threads_gives_the_same_bits(name: str, precision: str) -> None:
    case = cases.build(cases.WORKS[name], batch=BATCH[name])
    mask = cases.every(case, 200)
    estimator = dz.CGE(case.model, cases.objective, precision=precision)
    one = estimator.estimate(case.batch, mask)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        more = estimator.estimate(case.batch, mask)
        assert torch.get_num_threads() == threads
        assert more.loss == one.loss
        assert more.grads.keys() == one.grads.keys()
        for parameter, grad in one.grads.items():
            assert_exact(more.grads[parameter], grad)
