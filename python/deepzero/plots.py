"""The picture of a run."""

from __future__ import annotations

from pathlib import Path

from .errors import ConfigError
from .training.callbacks import read_metrics
from .training.config import FIRST_ORDER


def plot_run(folder: Path) -> Path:
    """Draw training loss and test accuracy of the run in ``folder`` into its ``run.png`` and return that path.

    The horizontal axis counts the zeroth-order run's queries; a first-order run beside it is drawn at equal epochs,
    with which the upper axis is marked. Raises ConfigError when matplotlib is missing or the run has no finished epoch.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ConfigError("matplotlib is not installed: pip install 'deepzero[train]'") from missing
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
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
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
