"""Runs the Triton kernels on CPU tensors (TRITON_INTERPRET=1): the cases of ops/cases against the reference, and
estimates by the plan that a GPU has, on Triton's kernels alone, against float64.

Started by test_cases.py in a process of its own; by hand with the names of ops: python interpret_triton.py gelu_...
or with "estimates".
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from triton.runtime import interpreter

import dzkernels
from deepzero.models import vit
from deepzero.models.vit import Block
from dzkernels import OPS, backends
from dzkernels.triton import _config
from judge import WideCGE, judge, plain_quotients, sampled, tolerance
from ops.table import CASES, check


class Residual(nn.Module):
    """A convolution, and a residual block with stride 2 on its way into a last one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = (nn.Conv2d(c, 4, 3, padding=1, bias=False) for c in (2, 4, 4))
        self.last = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.bn0, self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(c) for c in (4, 4, 4, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)
        return self.head(F.relu(self.bn3(self.last(x))).mean((2, 3)))


class ScaledQueries(Block):
    """Its queries are scaled before the attention, so that its linear layers go by kernels of their own."""

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q * 1.5, k, v)
        x = x + self.project(attended.transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer(block: type[Block]) -> nn.Module:
    model = vit(image_size=4, patch=2, blocks=0, width=8, heads=2, num_classes=3)
    model.blocks.append(block(8, 2, 16))
    return model


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


# Models with the size of an image, and kernels that must be on the way from the first parameter.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], tuple[str, ...]]] = {
    "convolutions": (
        Residual,
        (2, 5, 6),
        ("batch_norm+relu+conv2d+moments", "conv2d+moments", "batch_norm+residual+relu+conv2d+moments"),
    ),
    "transformer": (
        lambda: transformer(Block),
        (3, 4, 4),
        ("layer_norm+linear+attention+linear+residual", "layer_norm+linear+gelu+linear+residual"),
    ),
    "scaled queries": (
        lambda: transformer(ScaledQueries),
        (3, 4, 4),
        ("layer_norm+linear", "linear+residual", "layer_norm+linear+gelu+linear+residual"),
    ),
}


def estimates() -> None:
    for make, size, kernels in MODELS.values():
        torch.manual_seed(0)
        model = make()
        batch = torch.randn(2, *size, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2])
        mask = {name: chosen for name, chosen in sampled(model, cross_entropy, batch, 0).items() if chosen.any()}
        wanted = plain_quotients(model, cross_entropy, batch, mask, 5e-3)
        for precision in ("float32", "bfloat16"):
            with dzkernels.use_backend("triton"):
                ours = WideCGE(model, cross_entropy, precision=precision, strict=True)
                got = ours.estimate(batch, mask).grads
                with ours.engine.prepared(batch) as ready:
                    assert ready.base is not None
                    first = next(name for name, _ in model.named_parameters())
                    found = [step.kernel for step in ours.engine.planner.route(ready.base, first).steps]
            for kernel in kernels:
                assert kernel in found, f"{kernel} is not among {', '.join(filter(None, found))}"
            judge(got, wanted).check(tolerance(precision, 5e-3))


def _dot(self: Any, a: Any, b: Any, d: Any, *settings: Any) -> Any:
    """A product summed in float64. A BLAS sums float32 in an order that follows the shape of the tile, which a GPU's
    units do not: launch configurations could not be held to the same bits."""
    product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def main() -> None:
    interpreter.InterpreterBuilder.create_dot = _dot
    turn = itertools.count()
    os.environ["DZ_TUNE"] = "1"  # each launch takes the next configuration: none of them may move a bit
    _config._choose = lambda name, shape, configs, run: configs[next(turn) % len(configs)]
    for op in sys.argv[1:] or [*(op for op in OPS if backends.has_kernel("triton", op)), "estimates"]:
        started, count = time.perf_counter(), 0
        if op == "estimates":
            estimates()
            print(f"{op}: {time.perf_counter() - started:.1f} s")
            continue
        also = getattr(importlib.import_module(f"ops.cases.{op}"), "check_also", None)
        for case in CASES[op]():
            if case.large:
                continue
            try:
                check(op, case, "triton", "cpu")
                if also is not None and not case.nan:
                    with dzkernels.use_backend("triton"):
                        also(case.args)
            except Exception as error:
                raise AssertionError(f"{op}, case {case.id!r}: {error}") from error
            count += 1
        assert count, f"{op} has no case small enough for the interpreter"
        print(f"{op}: {count} cases in {time.perf_counter() - started:.1f} s")
    print("all equal")


if __name__ == "__main__":
    main()
