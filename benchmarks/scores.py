"""Which score orders the layers of ResNet-20 as first-order GraSP does? 192 directions, 90 % sparsity, five seeds.

    python -m benchmarks.scores

Every seed draws its own weights, images and random directions. The images are real and scaled to 3x32x32: MNIST
digits by default, the paper's CIFAR-10 with ``--data cifar10 --folder <its files>``. For each score the layer ratios
(fraction pruned of each of the 20 weight tensors) are compared with those of first-order GraSP on the same weights and
images: Spearman's rank correlation, and the mean absolute difference. Writes results/scores.csv and
../docs/figures/scores.png; exits with 1 when zo_grasp_layerwise does not beat the data-free formula.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deepzero as dz
from benchmarks import machine

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "grasp"
COMPARED = (
    "zo_grasp_layerwise",
    "zo_snip_layerwise",
    "data_free",
    "zo_grasp",
    "magnitude",
    "erk",
    "random",
)
SPARSITY = 0.9

Row = dict[str, Any]


def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sample(data: dz.data.ImageData, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """``each`` images of every class as [n, 3, 32, 32], with mean 0 and deviation 1, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in range(data.num_classes):
        members = (data.train_labels == label).nonzero()[:, 0]
        chosen.append(members[torch.randperm(len(members), generator=generator)[:each]])
    at = torch.cat(chosen)
    images = F.interpolate(data.train_images[at], size=32, mode="bilinear", align_corners=False)
    images = (images - images.mean()) / images.std()
    return images.expand(-1, 3, -1, -1).contiguous(), data.train_labels[at]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; tied values share the mean of their ranks."""

    def ranks(values: np.ndarray) -> np.ndarray:
        return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ratios(name: str, model: nn.Module, batch: Any, queries: int, seed: int) -> tuple[dict[str, float], int, float]:
    """(pruned fraction of every weight tensor, loss values spent, CPU seconds)."""
    options = dz.sparsity.score_options(name, queries=queries, seed=seed)
    began = time.process_time()
    scores = dz.sparsity.SCORES[name](model, objective, batch, **options)
    seconds = time.process_time() - began
    found = dz.sparsity.layer_ratios(scores, SPARSITY, least=1)
    return {n: r for n, r in found.pruned.items() if len(found.shapes[n]) > 1}, scores.queries, seconds


def measure(data: dz.data.ImageData, each: int, seed: int, queries: int, build: Any = dz.models.resnet20) -> list[Row]:
    torch.manual_seed(seed)
    model = build().train()
    batch = sample(data, each, seed)
    wanted, _, _ = ratios(REFERENCE, model, batch, queries, seed)
    rows = []
    for name in (REFERENCE, *COMPARED):
        found, spent, seconds = ratios(name, model, batch, queries, seed)
        a, b = np.array(list(found.values())), np.array(list(wanted.values()))
        rows.append(
            {
                "score": name,
                "seed": seed,
                "spearman": spearman(a, b),
                "mean_difference": float(np.abs(a - b).mean()),
                "loss_values": spent,
                "cpu_seconds": seconds,
                **found,
            }
        )
        print(f"seed {seed}  {name:20s} Spearman {rows[-1]['spearman']:6.3f}  {seconds:7.1f} s", flush=True)
    return rows


def write(rows: list[Row], path: Path, what: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        for line in [what, *(f"{key}: {value}" for key, value in machine.facts(torch.get_num_threads()).items())]:
            file.write(f"# {line}\n")
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def read(path: Path) -> list[Row]:
    """Rows that :func:`write` wrote."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return [{k: v if k == "score" else float(v) for k, v in row.items()} for row in rows]


def values(rows: list[Row], score: str, column: str) -> np.ndarray:
    """One column of a score, by seed."""
    return np.array([row[column] for row in rows if row["score"] == score])


def table(rows: list[Row]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = [
        "| score | Spearman | lowest seed | mean difference of ratios | loss values |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in COMPARED:
        rank, difference = values(rows, name, "spearman"), values(rows, name, "mean_difference")
        spent = int(values(rows, name, "loss_values")[0])
        lines.append(
            f"| `{name}` | {rank.mean():.3f} ± {rank.std(ddof=1):.3f} | {rank.min():.3f} | "
            f"{difference.mean():.3f} ± {difference.std(ddof=1):.3f} | {spent} |"
        )
    return "\n".join(lines)


def missed(rows: list[Row]) -> list[str]:
    """The promise that the rows break, in words."""
    ours, formula = (values(rows, name, "spearman").mean() for name in ("zo_grasp_layerwise", "data_free"))
    if ours > formula:
        return []
    return [f"zo_grasp_layerwise orders the layers with Spearman {ours:.3f}, the data-free formula with {formula:.3f}"]


def draw(rows: list[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    names = [name for name in reversed(COMPARED) if name != "random"]  # about 0, it would take up the axis
    for k, name in enumerate(names):
        found = values(rows, name, "spearman")
        left.plot(found, [k] * len(found), "o", ms=5, alpha=0.5, color="#1f5fa8")
        left.plot(found.mean(), k, "|", ms=18, mew=2.5, color="#1f5fa8")
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("Spearman correlation of layer ratios\nwith first-order GraSP's (bar: mean)")
    left.grid(axis="x", color="0.9")
    layers = list(rows[0])[list(rows[0]).index("cpu_seconds") + 1 :]
    styles = {
        REFERENCE: ("k", "-", "grasp (first order)"),
        "zo_grasp_layerwise": ("#1f5fa8", "-", "zo_grasp_layerwise"),
        "zo_grasp": ("#c0392b", "--", "zo_grasp"),
        "data_free": ("#e08e0b", "--", "data_free"),
    }
    for name, (colour, line, label) in styles.items():
        means = [values(rows, name, layer).mean() for layer in layers]
        right.plot(means, line, color=colour, marker="o", ms=3.5, label=label)
    right.set_xticks(range(len(layers)), [n.removesuffix(".weight") for n in layers], rotation=90, fontsize=8)
    right.set_ylabel("fraction pruned, mean over seeds")
    right.grid(color="0.92")
    right.legend(frameon=False)
    figure.suptitle("ResNet-20 at 90 % sparsity: layer ratios from 192 random directions")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist5000", help="a data set of deepzero.data")
    parser.add_argument("--folder", help="where its files are, for sets that no package ships")
    parser.add_argument("--images", type=int, default=3, help="images of each class")
    parser.add_argument("--queries", type=int, default=192, help="random directions of a score")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "scores.csv")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "scores.png")
    parser.add_argument("--redraw", action="store_true", help="draw and judge the rows of --results, measure nothing")
    options = parser.parse_args(arguments)
    if options.redraw:
        rows = read(options.results)
    else:
        rows = []
        for seed in range(options.seeds):
            rows += measure(dz.data.load(options.data, folder=options.folder), options.images, seed, options.queries)
            write(
                rows,
                options.results,
                f"ResNet-20 at initialisation in training mode; {options.images} images a class of {options.data} at "
                f"3x32x32; sparsity {SPARSITY}; {options.queries} directions; against first-order GraSP, largest |S| "
                "kept, vectors protected",
            )
    draw(rows, options.figure)
    print(table(rows))
    for line in missed(rows):
        print(f"MISSED: {line}", file=sys.stderr)
    return 1 if missed(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
