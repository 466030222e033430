"""The picture of a run, of a study and of layer ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..sparsity import LayerRatios
from ..training.ablate import METRICS, Row, by_label, curves, mean_and_spread
from ..training.callbacks import read_metrics
from ..training.config import FIRST_ORDER


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that many inches. Raises ConfigError when matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ConfigError("matplotlib is not installed: pip install 'deepzero[train]'") from missing
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_run(folder: Path) -> Path:
    """Draw training loss and test accuracy of the run in ``folder`` into its ``run.png`` and return that path.

    The horizontal axis counts the zeroth-order run's queries; a first-order run beside it is drawn at equal epochs,
    with which the upper axis is marked. Raises ConfigError when matplotlib is missing or the run has no finished epoch.
    """
    runs = {"zeroth-order": folder / "metrics.jsonl"}
    runs |= {f"{label}, same steps": folder / label / "metrics.jsonl" for label in FIRST_ORDER.values()}
    epochs = {
        label: [record for record in read_metrics(path) if record["event"] == "epoch"]
        for label, path in runs.items()
        if path.exists()
    }
    own = epochs.get("zeroth-order")
    if not own:
        raise ConfigError(f"{folder}: no finished epoch to draw. Give the folder of a run that has at least one.")
    queries_per_epoch = own[-1]["queries"] / own[-1]["epoch"]
    figure = new_figure(10, 4)
    for axes, value, title in zip(
        figure.subplots(1, 2), ("train_loss", "test_accuracy"), ("training loss", "test accuracy"), strict=True
    ):
        if value == "train_loss":
            axes.set_yscale("log")
        for (label, records), style in zip(epochs.items(), ("-", "--", "-.", ":"), strict=False):
            shown = [record for record in records if value in record]
            axes.plot(
                [record["epoch"] * queries_per_epoch for record in shown],
                [record[value] for record in shown],
                style,
                label=label,
            )
        axes.set_xlabel("queries of the zeroth-order run")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
        upper = axes.secondary_xaxis(
            "top", functions=(lambda q: q / queries_per_epoch, lambda e: e * queries_per_epoch)
        )
        upper.set_xlabel("epochs")
    target = folder / "run.png"
    figure.savefig(target, dpi=120)
    return target


def plot_ablation(rows: Sequence[Row], target: Path, *, title: str, metric: str = "test_accuracy") -> Path:
    """Draw ``metric`` by label, mean and standard deviation over seeds, into ``target`` and return that path.

    Labels that all end in ``key=number`` with one key become curves over that number, on a logarithmic axis when they
    span more than a factor of 20; others become one line each. A label without a usable value is left empty.
    """
    groups = by_label(rows)
    points = {label: mean_and_spread(getattr(row, metric) for row in group) for label, group in groups.items()}
    found = curves(groups)
    figure = new_figure(7, 4.2 if found else 1.4 + 0.32 * len(groups))
    axes = figure.subplots()
    style: dict[str, Any] = {"marker": "o", "markersize": 5, "capsize": 3}
    if found is None:
        for label, (mean, deviation) in points.items():
            axes.errorbar([mean], [label], xerr=[deviation], color="#1f6feb", **style)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlabel(METRICS[metric])
    else:
        name, lines = found
        for (curve, at), shape in zip(lines.items(), ("o", "s", "^", "D", "v", "P", "X") * len(lines), strict=False):
            shown = sorted((x, *points[label]) for label, x in at.items())
            x, means, deviations = zip(*shown, strict=True)
            axes.errorbar(x, means, yerr=deviations, label=curve, **style | {"marker": shape})
        every = [x for at in lines.values() for x in at.values()]
        if min(every) > 0 and max(every) > 20 * min(every):
            axes.set_xscale("log")
        if any(lines):
            axes.legend()
        axes.set_xlabel(name)
        axes.set_ylabel(METRICS[metric])
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=10)
    figure.savefig(target, dpi=120, metadata={"Software": None})
    return target


def plot_ratios(ratios: Mapping[str, LayerRatios], target: Path) -> Path:
    """Draw the fraction pruned of every parameter, several ratios side by side, and return ``target``.

    ``ratios`` maps a label to ratios of one model; parameters that all of them leave whole are left out. Raises
    ConfigError when matplotlib is missing.
    """
    every = list(next(iter(ratios.values())).pruned)
    names = [name for name in every if any(found.pruned[name] > 0 for found in ratios.values())]
    figure = new_figure(max(6.0, 2 + 0.12 * len(names) * (1 + len(ratios))), 4.5)
    axes = figure.subplots()
    width = 0.8 / len(ratios)
    for k, (label, found) in enumerate(ratios.items()):
        places = [place + (k - (len(ratios) - 1) / 2) * width for place in range(len(names))]
        axes.bar(places, [found.pruned[name] for name in names], width, label=label)
    axes.set_xticks(range(len(names)), [name.removesuffix(".weight") for name in names], rotation=90, fontsize=8)
    axes.set_ylabel("fraction pruned")
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(target, dpi=120)
    return target
