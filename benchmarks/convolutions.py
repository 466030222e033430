"""The convolutions of ResNet-20 on one GPU: PyTorch's (cuDNN's), Triton's and the CUDA C++ one on the same differences,
alone and after the batch norm before them. Which of them a plan should take is decided by this table.

    python -m benchmarks.convolutions [--dtype bfloat16] [--out FILE.csv]
    python -m benchmarks.convolutions --device cpu --quick     # a rehearsal without a GPU: the CPU kernels
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import dzkernels

from . import gpu, machine
from .throughput import RESULTS, record

KEY = ("layer", "work", "dtype", "way", "device")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CALLS = 10
"""Calls that are recorded and replayed together, so that launching from Python costs them nothing."""

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution, padding 1; side is that of its input images."""

    channels: int
    outs: int
    stride: int
    side: int

    def __str__(self) -> str:
        return f"{self.channels} to {self.outs}, {self.side}x{self.side}, stride {self.stride}"


LAYERS = (Layer(16, 16, 1, 32), Layer(16, 32, 2, 32), Layer(32, 32, 1, 16), Layer(32, 64, 2, 16), Layer(64, 64, 1, 8))


class Work:
    """One layer's differences [P, N, C, H, W] in channels-last memory, and what the norm before it needs."""

    def __init__(self, layer: Layer, dtype: torch.dtype, device: str, perturbations: int, samples: int) -> None:
        torch.manual_seed(0)

        def images(*outer: int) -> Tensor:
            return torch.randn(*outer, layer.side, layer.side, layer.channels, device=device).movedim(-1, -3)

        self.delta = (1e-2 * images(perturbations, samples)).to(dtype)
        self.weight = torch.randn(layer.outs, layer.channels, 3, 3, device=device).to(dtype) / 3
        base, self.y = images(samples), images(samples)
        self.zc = base - base.mean((0, 2, 3), keepdim=True)
        self.var = self.zc.double().square().mean((0, 2, 3))
        self.stride = layer.stride

    def norm(self, backend: str | None) -> Tensor:
        with dzkernels.use_backend(backend):
            return dzkernels.dense_batch_norm(
                self.delta, self.zc, self.var, y=self.y, relu=True, out_dtype=self.delta.dtype
            )

    def convolution(self, backend: str, moved: Tensor | None = None) -> Tensor:
        with dzkernels.use_backend(backend):
            return dzkernels.dense_conv2d(
                self.delta if moved is None else moved, self.weight, stride=self.stride, padding=1
            )

    def after_norm(self, backend: str) -> Tensor:
        return self.convolution(backend, self.norm(None))

    def fused(self, backend: str) -> Tensor:
        with dzkernels.use_backend(backend):
            return dzkernels.batch_norm_conv2d(
                self.delta, self.zc, self.var, self.weight, y=self.y, relu=True, stride=self.stride, padding=1
            )

    def ways(self, backends: Sequence[str]) -> dict[tuple[str, str], Step]:
        """(work, way) -> one call of it. The norm is the one that is chosen by itself; fused is not the reference."""
        out: dict[tuple[str, str], Step] = {}
        for backend in backends:
            out["convolution", backend] = partial(self.convolution, backend)
            out["norm and convolution", backend] = partial(self.after_norm, backend)
            if backend != "reference" and dzkernels.backends.has_kernel(backend, "batch_norm_conv2d"):
                out["norm and convolution", f"{backend}, fused"] = partial(self.fused, backend)
        return out

    def wanted(self, work: str) -> tuple[Tensor, Tensor]:
        """Of the first perturbation in float64, and of magnitudes: what errors scale with."""
        moved = self.delta[0] if work == "convolution" else self.norm("reference")[0]

        def by_torch(images: Tensor, weight: Tensor) -> Tensor:
            return F.conv2d(images.double(), weight.double(), None, self.stride, 1)

        return by_torch(moved, self.weight), by_torch(moved.abs(), self.weight.abs())


def error(got: Tensor, wanted: Tensor, magnitude: Tensor) -> float:
    """The largest difference, in parts of what the sums are made of; NaN where there is one."""
    return float(((got.double() - wanted).abs() / magnitude.clamp_min(1e-300)).max())


def measure(step: Step, device: str, seconds: float) -> float:
    """Seconds of one call: the median of replays of several, for at least ``seconds``."""
    calls = CALLS if device == "cuda" else 1

    def several() -> Tensor:
        for _ in range(calls - 1):
            step()
        return step()

    replay = gpu.replayed(several, torch.device(device))
    replay()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        times.append(machine.spent(replay, device))
    return statistics.median(times) / calls


def verdict(found: float, work: str, dtype: torch.dtype, layer: Layer) -> str:
    """Roundings of the result, or of a float32 sum and what two tf32 leave of a factor; of the norm as many again."""
    unit = {torch.bfloat16: 2.0**-8, torch.float32: (9 * layer.channels + 12) * 2.0**-24}[dtype]
    return "ok" if found <= unit * (1 if work == "convolution" else 4) else "wrong"


def rows(layer: Layer, dtype: str, device: str, options: argparse.Namespace) -> list[dict[str, str]]:
    """A row for each way; one that fails says why."""
    work = Work(layer, DTYPES[dtype], device, options.perturbations, options.samples)
    backends = ("reference", "triton", "cuda") if device == "cuda" else ("reference", "cpu")
    out = []
    for (name, way), step in work.ways(backends).items():
        row = {"layer": str(layer), "work": name, "dtype": dtype, "way": way}
        try:
            found = error(step()[0], *work.wanted(name))
            row |= {"verdict": verdict(found, name, DTYPES[dtype], layer), "error": gpu.number(found)}
            row["us"] = gpu.number(1e6 * measure(step, device, options.seconds))
        except RuntimeError as problem:  # not built, or out of memory
            row["verdict"] = f"failed: {problem}".splitlines()[0]
        out.append(row)
    return out


def winners(table: list[dict[str, str]]) -> list[str]:
    """One line for each layer, work and dtype: what was fastest, and by how much over PyTorch's."""
    lines = []
    for key in dict.fromkeys((row["layer"], row["work"], row["dtype"]) for row in table):
        timed = {
            row["way"]: float(row["us"])
            for row in table
            if (row["layer"], row["work"], row["dtype"]) == key and row["verdict"] == "ok" and "us" in row
        }
        if not timed:
            lines.append(f"{', '.join(key)}: nothing ran")
            continue
        best = min(timed, key=lambda way: timed[way])
        against = f", {timed['reference'] / timed[best]:.2f}x PyTorch's" if "reference" in timed else ""
        lines.append(f"{', '.join(key)}: {best} {timed[best]:.4g} us{against}")
    return lines


def main(arguments: list[str] | None = None) -> list[dict[str, str]]:
    parser = argparse.ArgumentParser(description="The convolutions of ResNet-20 by each of their kernels, on one GPU.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="where to measure (cuda)")
    parser.add_argument("--dtype", default="bfloat16,float32", help="which, by commas (both)")
    parser.add_argument("--perturbations", type=int, default=16, help="P (16)")
    parser.add_argument("--samples", type=int, default=128, help="N (128)")
    parser.add_argument("--seconds", type=float, default=0.5, help="measure each about so long (0.5)")
    parser.add_argument("--quick", action="store_true", help="one small layer, to see that everything runs")
    parser.add_argument(
        "--out", type=Path, help="the table; by default results/convolutions-<device>.csv, not for a CPU"
    )
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.dtype.split(",") if name not in DTYPES]:
        raise SystemExit(f"no dtype called {', '.join(unknown)}: there are {', '.join(DTYPES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device. --device cpu --quick rehearses")
    gpu.prepare("tuned")
    name = torch.cuda.get_device_name() if options.device == "cuda" else machine.cpu_name()
    same = {"device": name} | gpu.software()
    out = options.out
    if out is None and options.device == "cuda":
        out = RESULTS / f"convolutions-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.csv"
    if options.quick:
        options.perturbations, options.samples, options.seconds = 2, 3, 0.0
    table: list[dict[str, str]] = []
    for layer in (Layer(16, 32, 2, 9),) if options.quick else LAYERS:
        for dtype in options.dtype.split(","):
            found = [row | same for row in rows(layer, dtype, options.device, options)]
            table += found
            if out is not None:
                record(out, found, KEY)
            for row in found:
                print(" ".join(row.get(column, "-") for column in (*KEY[:4], "us", "error", "verdict")), flush=True)
    print("\n".join(["", *winners(table)]))
    return table


if __name__ == "__main__":
    main()
