"""Sweeps: one training for every setting and seed, each an ordinary run, gathered in a table."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ..data import ImageData
from ..errors import BudgetError, ConfigError, DeepZeroError, ObjectiveError, StepError
from . import checkpoint
from .build import build_trainer, prepare
from .callbacks import Progress, read_metrics
from .config import Config, DataSection, load_config
from .launch import resume, start

METRICS = {"test_accuracy": "test accuracy", "test_loss": "test loss", "train_loss": "training loss"}
"""Values of an epoch that a study may be judged by -> how they are called."""

ENDINGS: dict[type[DeepZeroError], str] = {
    ObjectiveError: "not finite",
    StepError: "step vanishes",
    BudgetError: "budget spent",
}
"""How a cell may end that is a finding, not a mistake: the others go on."""

DONE = "done"
_FIRST = ("tensorboard=false",)
_LAST = ("first_order=false",)  # a cell is one training


@dataclass(frozen=True)
class Study:
    """What a sweep varies, as plain data.

    title     one line
    cells     label -> the ``key=value`` overrides of that cell; a label that ends in ``key=number`` is a point of a
              curve, which what stands before names
    settings  overrides of all cells: they win over a configuration file and yield to ``--set``
    metric    the value of ``METRICS`` that the picture shows
    """

    title: str
    cells: Mapping[str, Sequence[str]]
    settings: Sequence[str] = ()
    metric: str = "test_accuracy"


@dataclass(frozen=True)
class Row:
    """One cell with one seed: the values of its last epoch, NaN where it ended without a usable one.

    ended    "done", or one of ``ENDINGS``
    epochs   finished ones
    queries  perturbed function values in all; seconds are wall time, cpu_seconds those of all threads
    """

    label: str
    seed: int
    ended: str
    epochs: int
    test_accuracy: float
    test_loss: float
    train_loss: float
    queries: int
    seconds: float
    cpu_seconds: float


def sweep(axes: Sequence[str]) -> Study:
    """The study of every combination of ``section.key=value,value,...``; values as in ``--set``.

    Raises ConfigError for an axis without values and for a value given twice.
    """
    parts: dict[str, list[str]] = {}
    for axis in axes:
        key, _, text = axis.partition("=")
        values = _split(text)
        if not all([*key.split("."), *values]):
            raise ConfigError(
                f"--sweep {axis}: expected section.key=value,value,..., for example --sweep sparsity.fraction=0.8,0.9"
            )
        if len({*values}) < len(values):
            raise ConfigError(f"--sweep {axis}: a value is given twice")
        if key in parts:
            raise ConfigError(f"--sweep {axis}: {key} is swept already")
        parts[key] = [f"{key}={value}" for value in values]
    return Study(", ".join(axes), {", ".join(chosen): chosen for chosen in itertools.product(*parts.values())})


def _split(text: str) -> list[str]:
    """``text`` at the commas that no bracket encloses."""
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def resolve(study: Study, path: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Config]:
    """Label -> configuration: the file's values, the study's settings, ``overrides``, the cell's own.

    Raises ConfigError for anything unknown or unusable, and for an override that would change no cell.
    """
    if study.metric not in METRICS:
        raise ConfigError(f"metric = {study.metric!r} is unknown. Known: {', '.join(METRICS)}.")
    for override in overrides:
        key = _key(override)
        cells = [("seed", "first_order", *map(_key, cell)) for cell in study.cells.values()]
        lost = [next((own for own in cell if f"{key}.".startswith(f"{own}.")), None) for cell in cells]
        if all(lost):
            raise ConfigError(f"--set {override}: every cell of this study sets {lost[0]} itself. Leave it out.")
    shared = [*_FIRST, *study.settings, *overrides]
    return {label: load_config(path, [*shared, *cell, *_LAST]) for label, cell in study.cells.items()}


def _key(override: str) -> str:
    return override.partition("=")[0]


def run(name: str, study: Study, configs: Mapping[str, Config], folder: Path, *, seeds: int) -> list[Row]:
    """Train every cell of ``configs`` (see :func:`resolve`) with seeds 0 .. ``seeds`` - 1, all labels of a seed first.

    Every cell is a run of its own in ``folder``; finished ones are skipped and a stopped one is resumed, so the same
    call goes on where the last one was ended, by whatever. ``results.csv`` and ``table.md`` are written anew after
    every cell. A cell whose loss overflows, whose step vanishes or whose budget is spent gets a row that says so.

    Raises ConfigError before any work for a cell that cannot be built, ``seeds`` below 1 and a folder that holds
    another study or something else.
    """
    if seeds < 1:
        raise ConfigError(f"seeds = {seeds}: a study takes at least one. Use 3 to see a spread.")
    _check(configs, folder)
    _claim(folder, name, configs)
    rows: dict[tuple[int, int], Row] = {}
    with _Bar(name, len(configs) * seeds) as bar:
        for seed, (number, (label, config)) in itertools.product(range(seeds), enumerate(configs.items())):
            place = folder / f"{number:02d}-{re.sub(r'[^A-Za-z0-9.=+-]+', '_', label)}" / f"seed-{seed}"
            title = f"{label}, seed {seed}"
            rows[number, seed] = _cell(label, config.model_copy(update={"seed": seed}), place, title)
            written = [rows[at] for at in sorted(rows)]
            write_rows(written, folder / "results.csv")
            (folder / "table.md").write_text(f"{study.title}\n\n{table(written)}", encoding="utf-8")
            bar.done(title, rows[number, seed])
    return written


def _check(configs: Mapping[str, Config], folder: Path) -> None:
    """Build every cell once, so that a mistake in the last one costs no run of the first."""
    loaded: dict[tuple[DataSection, str, int], ImageData] = {}
    for label, config in configs.items():
        key = config.data, config.device, config.threads
        try:
            if key not in loaded:
                loaded[key] = prepare(config)
            build_trainer(config, loaded[key], folder)
        except DeepZeroError as mistake:
            raise type(mistake)(f"{label}: {mistake}") from mistake


def _claim(folder: Path, name: str, configs: Mapping[str, Config]) -> None:
    """Make ``folder`` this study's own, or see that it is."""
    path = folder / "study.json"
    content = json.dumps({"study": name, "cells": {k: c.model_dump() for k, c in configs.items()}}, indent=1)
    if path.exists():
        if path.read_text(encoding="utf-8") != content:
            raise ConfigError(
                f"{folder} holds another study, or this one with other settings (see {path}). Choose another folder, "
                "or repeat the command that began it."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty and holds no study. Choose a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    _replace(path, content)


def _cell(label: str, config: Config, place: Path, title: str) -> Row:
    last = place / "checkpoints" / "last.pt"
    progress = Progress(title, part=True)
    ended = DONE
    try:
        if not last.exists():
            (place / "config.toml").unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
            start(config, place, progress=progress)
        elif checkpoint.load(last)["counters"]["epoch"] < config.epochs:
            resume(place, progress=progress)
    except tuple(ENDINGS) as ending:
        ended = next(text for kind, text in ENDINGS.items() if isinstance(ending, kind))
    path = place / "metrics.jsonl"
    epochs = [r for r in read_metrics(path) if r["event"] == "epoch"] if path.exists() else []
    record = epochs[-1] if epochs else {}
    usable = record if ended in (DONE, ENDINGS[BudgetError]) else {}
    return Row(
        label,
        config.seed,
        ended,
        len(epochs),
        *(usable.get(name, math.nan) for name in METRICS),
        *(record.get(name, 0) for name in ("queries", "seconds", "cpu_seconds")),
    )


class _Bar:
    """A tqdm bar over cells on a terminal; elsewhere a line for every cell."""

    def __init__(self, name: str, total: int, stream: IO[str] | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self._name, self._total, self._count = name, total, 0
        self._bar = tqdm(total=total, desc=name, unit="run", file=self.stream, disable=not self.stream.isatty())

    def __enter__(self) -> _Bar:
        self._bar.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def done(self, title: str, row: Row) -> None:
        self._count += 1
        self._bar.update()
        accuracy = "" if math.isnan(row.test_accuracy) else f", test accuracy {row.test_accuracy:.2%}"
        text = f"{title}: {row.ended}{accuracy}, {row.queries:,} queries"
        if self._bar.disable:
            self.stream.write(f"{self._name} {self._count} of {self._total}: {text}\n")
            self.stream.flush()
        else:
            self._bar.write(text, file=self.stream)


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Rows as CSV, whole or not at all."""
    text = io.StringIO()
    file = csv.writer(text, lineterminator="\n")
    file.writerow(field.name for field in fields(Row))
    for row in rows:
        file.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in asdict(row).values())
    _replace(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that :func:`write_rows` wrote; columns beyond those of :class:`Row` are left out."""
    kinds: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}
    with open(path, newline="", encoding="utf-8") as file:
        return [Row(**{f.name: kinds[str(f.type)](line[f.name]) for f in fields(Row)}) for line in csv.DictReader(file)]


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def by_label(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.label, []).append(row)
    return groups


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation of the values that are not NaN; NaN without any, or without a second."""
    known = [value for value in values if not math.isnan(value)]
    return (
        statistics.fmean(known) if known else math.nan,
        statistics.stdev(known) if len(known) > 1 else math.nan,
    )


def table(rows: Sequence[Row]) -> str:
    """Mean and standard deviation over seeds by label, as Markdown; costs are means."""
    lines = [
        "| setting | test accuracy, % | test loss | training loss | queries | seconds | CPU seconds | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for label, group in by_label(rows).items():
        metrics = [
            _spread([getattr(row, name) * (100 if name == "test_accuracy" else 1) for row in group], digits)
            for name, digits in (("test_accuracy", 2), ("test_loss", 3), ("train_loss", 3))
        ]
        costs = [
            f"{statistics.fmean(getattr(row, name) for row in group):,.0f}"
            for name in ("queries", "seconds", "cpu_seconds")
        ]
        early = [row.ended for row in group if row.ended != DONE]
        seeds = "; ".join([str(len(group)), *(f"{early.count(text)} {text}" for text in dict.fromkeys(early))])
        lines.append(f"| {' | '.join([label, *metrics, *costs, seeds])} |")
    return "\n".join(lines) + "\n"


def _spread(values: Iterable[float], digits: int) -> str:
    mean, deviation = mean_and_spread(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


_POINT = re.compile(r"^(?:(.*), )?([^,=]+)=([+-]?[0-9][0-9_.]*(?:e[+-]?[0-9]+)?)$", re.IGNORECASE)


def curves(labels: Iterable[str]) -> tuple[str, dict[str, dict[str, float]]] | None:
    """(axis, curve -> label -> position) when every label ends in ``axis=number`` with one axis; None otherwise."""
    found: dict[str, dict[str, float]] = {}
    axes = set()
    for label in labels:
        point = _POINT.match(label)
        if point is None:
            return None
        axes.add(point[2])
        found.setdefault(point[1] or "", {})[label] = float(point[3])
    return (axes.pop(), found) if len(axes) == 1 and any(len(points) > 1 for points in found.values()) else None
