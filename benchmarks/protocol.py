"""The studies behind docs/protocol.md: trained, kept as rows, drawn.

python -m benchmarks.protocol run [name ...]     trains them in runs/protocol; goes on where it was stopped
python -m benchmarks.protocol                    the page and its figures again, from the rows
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from deepzero.report.plots import plot_ablation
from deepzero.training import ablate, studies
from deepzero.training.ablate import Row, Study, by_label, mean_and_spread
from deepzero.training.studies import STUDIES, equal_queries, protocol

from .machine import ROOT, facts

RESULTS = Path(__file__).parent / "results"
FIGURES = ROOT / "docs" / "figures"
PAGE = ROOT / "docs" / "protocol.md"
WORK = Path("runs", "protocol")

ZEROTH, FIRST = ": zeroth order", ": first order"
OURS, PLAIN = "deepzero, mu=", "plain float32 loop, mu="


@dataclass(frozen=True)
class Job:
    """A study on one task. what: task and network, in words; settings: overrides as of ``--set``."""

    study: Study
    what: str
    settings: Sequence[str] = ()
    seeds: int = 3


_MNIST = ("data.name=mnist5000", "data.batch_size=128")
_MLP = ("model.name=mlp", "model.options={hidden=[10]}")
_RESNET = ("model.name=resnet20", "model.options={}", "data.batch_size=32", "epochs=6")

_ALL = (
    "DeepZero",
    "DeepZero, published score",
    "layer-wise, every step",
    "uniform, every step",
    "fixed",
    "always on",
    "cost-aware",
    studies.STALE,
)

JOBS: dict[str, Job] = {
    "digits": Job(
        protocol(_ALL),
        "digits (1,438 training and 359 test images, 8x8), the paper's CNN of depth 3 (6,346 weights), batches of 64, "
        "15 epochs",
        ("epochs=15",),
    ),
    "mnist": Job(
        protocol(_ALL),
        "MNIST-5000 (4,000 training and 1,000 test images, 28x28), the paper's CNN of depth 3 (6,346 weights), batches "
        "of 128, 6 epochs",
        (*_MNIST, "epochs=6"),
    ),
    "resnet20": Job(
        protocol(["uniform, every step"]),
        "digits, ResNet-20 (269,434 weights), batches of 32, 6 epochs",
        _RESNET,
    ),
    "mu": Job(STUDIES["mu"], "digits, the paper's CNN of depth 2 and width 8 (786 weights), 90 % sparsity, 15 epochs"),
    "q-cnn": Job(
        STUDIES["q"], "digits, the paper's CNN of depth 2 and width 8 (786 weights), batches of 64, 15 epochs"
    ),
    "q-mlp": Job(
        equal_queries(7_960, (1, 10, 100, 500), settings=(*_MNIST, *_MLP, "epochs=6")),
        "MNIST-5000, MLP 784-10-10 (7,960 weights), batches of 128, 6 epochs",
    ),
}
"""Name, and that of its rows and figure -> what is trained."""


def rows_of(name: str) -> Path:
    return RESULTS / f"protocol-{name}.csv"


def train(name: str) -> None:
    job = JOBS[name]
    configs = ablate.resolve(job.study, None, job.settings)
    keep(name, ablate.run(name, job.study, configs, WORK / name, seeds=job.seeds))


def keep(name: str, rows: Sequence[Row]) -> None:
    """Write rows with the facts of this machine."""
    about = facts(threads=1)
    with open(rows_of(name), "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*asdict(rows[0]), *about], lineterminator="\n")
        table.writeheader()
        for row in rows:
            values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            table.writerow(values | about)


def section(name: str) -> str:
    """What the page says about one job: task, machine, table."""
    path = rows_of(name)
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))

    def joined(column: str) -> str:
        return ", ".join(sorted({line[column] for line in lines}))

    about = (
        f"{JOBS[name].what[0].upper()}{JOBS[name].what[1:]}. Commit {joined('commit')}, torch {joined('torch')}, "
        f"{joined('cpu')}, one thread, {joined('date')}."
    )
    return f"{about}\n\n{ablate.table(ablate.read_rows(path))}"


def begin(name: str) -> str:
    return f"<!-- rows of {name}: python -m benchmarks.protocol -->"


END = "<!-- end of rows -->"


def insert(page: str, sections: Mapping[str, str]) -> str:
    """The page with each text after its mark; ValueError when the page lacks one."""
    for name, text in sections.items():
        pattern = re.compile(re.escape(begin(name)) + ".*?" + re.escape(END), re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"the page lacks {begin(name)} or {END}")
        page = pattern.sub(lambda _, text=text, name=name: f"{begin(name)}\n\n{text}\n{END}", page)
    return page


def render() -> None:
    known = [name for name in JOBS if rows_of(name).exists()]
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), {name: section(name) for name in known}), encoding="utf-8")
    for name in known:
        plot_ablation(ablate.read_rows(rows_of(name)), FIGURES / f"protocol-{name}.png", title=JOBS[name].study.title)


def mean(rows: Sequence[Row], label: str) -> float:
    return mean_and_spread(row.test_accuracy for row in by_label(rows)[label])[0]


def points_behind(rows: Sequence[Row]) -> dict[str, float]:
    """Mask policy -> points of test accuracy that first order is ahead of zeroth order with the same masks."""
    labels = [label.removesuffix(ZEROTH) for label in by_label(rows) if label.endswith(ZEROTH)]
    return {
        name: 100 * (mean(rows, name + FIRST) - mean(rows, name + ZEROTH))
        for name in labels
        if name + FIRST in by_label(rows)
    }


def steps(rows: Sequence[Row], method: str) -> dict[float, list[float]]:
    """mu -> test accuracies by seed."""
    return {
        float(label.removeprefix(method)): [row.test_accuracy for row in group]
        for label, group in by_label(rows).items()
        if label.startswith(method)
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", choices=["run"], help="train, instead of drawing what is there")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(JOBS)}; default all")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in JOBS:
            parser.error(f"{name} is unknown: {', '.join(JOBS)}")
    if options.command:
        for name in options.names or JOBS:
            train(name)
    render()
    return 0


if __name__ == "__main__":
    sys.exit(main())
