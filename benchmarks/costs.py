"""What an estimate costs beside the plain loop: capture, memory, time.

    python benchmarks/costs.py

Every case runs in a process of its own on one thread. Times are CPU seconds of that process, median of the repeats,
so that other work on the machine does not count. Both methods estimate the same coordinates with the same step.
Writes results/costs.csv, and its rows into the pages that quote them, ../docs/costs.md and ../README.md.
"""

from __future__ import annotations

import csv
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import deepzero as dz
from deepzero.baselines import PlainLoop

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks" / "results" / "costs.csv"
ENOUGH = 1.0
"""CPU seconds after which a median is taken, of three repeats at least"""

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int | None]] = {
    "linear 4-3, all weights": (lambda: nn.Linear(4, 3), (8, 4), None),
    "MLP 64-32-10, 3 weights": (lambda: dz.models.mlp(image_size=8, hidden=(32,)), (64, 1, 8, 8), 3),
    "MLP 64-32-10, all weights": (lambda: dz.models.mlp(image_size=8, hidden=(32,)), (64, 1, 8, 8), None),
    "paper CNN, depth 2, 200 weights": (lambda: dz.models.paper_cnn(2, in_channels=1), (64, 1, 28, 28), 200),
    "paper CNN, depth 4, 200 weights": (lambda: dz.models.paper_cnn(4), (64, 3, 32, 32), 200),
    "ResNet-20, 50 weights": (dz.models.resnet20, (32, 3, 32, 32), 50),
}
"""name -> model, shape of a random batch, random coordinates to estimate (None: all)"""


def objective(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def cpu_seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def median_seconds(function: Callable[[], Any]) -> float:
    found: list[float] = []
    while len(found) < 3 or (sum(found) < ENOUGH and len(found) < 301):
        found.append(cpu_seconds(function))
    return statistics.median(found)


def chosen(model: nn.Module, count: int | None) -> dict[str, torch.Tensor]:
    """A mask of ``count`` random coordinates over all parameters."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    flat = torch.zeros(sum(sizes.values()), dtype=torch.bool)
    flat[torch.randperm(len(flat))[: count or len(flat)]] = True
    parts = flat.split(list(sizes.values()))
    return {name: part.view(p.shape) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}


def base_bytes(estimator: dz.CGE, batch: Any) -> int:
    """Bytes of the float64 values that the base pass keeps, views counted once."""
    with estimator.engine.prepared(batch) as ready:
        assert ready.base is not None
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for node in ready.base.graph.graph.nodes
            if node.op == "call_function" and isinstance(tensor := ready.base.exact(node), torch.Tensor)
        }
    return sum(storages.values())


def number(value: float) -> str:
    """Two significant digits, never in scientific notation."""
    return f"{float(f'{value:.2g}'):g}" if value < 1e6 else f"{value:.0f}"


def measure(name: str) -> dict[str, str]:
    """One row. The first estimate of a process also pays for the tracer's own start."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    build, shape, count = CASES[name]
    model = build()
    batch = (torch.randn(shape), torch.randint(0, 3, shape[:1]))
    mask = chosen(model, count)
    first = dz.CGE(model, objective)
    first_seconds = cpu_seconds(lambda: first.estimate(batch, mask))
    again = dz.CGE(model, objective)
    again_seconds = cpu_seconds(lambda: again.estimate(batch, mask))
    later = median_seconds(lambda: again.estimate(batch, mask))
    plain = PlainLoop(model, objective)
    plain_seconds = median_seconds(lambda: plain.estimate(batch, mask))
    lines = again.plan(batch, mask).lines
    saved = plain_seconds - later
    return {
        "case": name,
        "weights": str(sum(p.numel() for p in model.parameters())),
        "coordinates": str(sum(int(m.sum()) for m in mask.values())),
        "batch": str(shape[0]),
        "first_estimate_ms": number(first_seconds * 1e3),
        "first_of_another_estimator_ms": number(again_seconds * 1e3),
        "later_estimate_ms": number(later * 1e3),
        "plain_loop_ms": number(plain_seconds * 1e3),
        "times_faster": number(plain_seconds / later),
        "pays_after_estimates": str(math.ceil((first_seconds - later) / saved)) if saved > 0 else "never",
        "base_values_mib": number(base_bytes(again, batch) / 2**20),
        "most_kib_per_perturbation": number(max(line.bytes for line in lines) / 1024),
        "smallest_block": str(min(line.block for line in lines)),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "deepzero": dz.__version__,
    }


COLUMNS = {
    "case": "model and coordinates",
    "first_estimate_ms": "first estimate, ms",
    "first_of_another_estimator_ms": "a second estimator's first, ms",
    "later_estimate_ms": "later ones, ms",
    "plain_loop_ms": "plain loop, ms",
    "times_faster": "times faster",
    "pays_after_estimates": "pays after",
    "base_values_mib": "base values, MiB",
    "most_kib_per_perturbation": "KiB a perturbation, at most",
    "smallest_block": "perturbations a block, at least",
}
"""column of the file -> its heading in a page"""


Columns = tuple[str, ...]
TIME: Columns = tuple(COLUMNS)[:7]
MEMORY: Columns = ("case", *tuple(COLUMNS)[7:])
SHORT: Columns = ("case", "later_estimate_ms", "plain_loop_ms", "times_faster", "pays_after_estimates")
PAGES: dict[Path, tuple[Columns, ...]] = {ROOT / "docs" / "costs.md": (TIME, MEMORY), ROOT / "README.md": (SHORT,)}
"""page -> the tables it quotes, between the two marks"""
BEGIN, END = "<!-- costs: written by benchmarks/costs.py -->\n", "\n<!-- end of costs -->"


def table(rows: Sequence[Mapping[str, str]], columns: Columns) -> str:
    """Some columns of the rows as Markdown."""
    lines = [[COLUMNS[c] for c in columns], ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[row[c] for c in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quote(rows: Sequence[Mapping[str, str]]) -> None:
    """Put the rows into the pages."""
    for page, tables in PAGES.items():
        quoted = "\n\n".join(table(rows, columns) for columns in tables)
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END, 1)[1]
        page.write_text(f"{before}{BEGIN}\n{quoted}\n{END}{after}", encoding="utf-8")


def main() -> None:
    rows = []
    spawn = multiprocessing.get_context("spawn")
    for name in CASES:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            rows.append(pool.submit(measure, name).result())
        print(f"{name}: done", flush=True)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    with open(OUTPUT, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    quote(rows)
    print(table(rows, TIME))


if __name__ == "__main__":
    main()
