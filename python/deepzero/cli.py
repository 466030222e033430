"""The command ``deepzero``: train, resume, ablate, plan, check, prune, info.

Exit codes: 0 done, 1 ``check`` found wrong quotients, 2 a usage, configuration, data or checkpoint error, 3 the query
budget is spent, 4 a loss or weight is not finite, 130 interrupted (a checkpoint was written).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .errors import BudgetError, ConfigError, DeepZeroError, ObjectiveError, did_you_mean
from .training.studies import STUDIES

if TYPE_CHECKING:
    from .estimators import CGE
    from .sparsity import LayerRatios
    from .training.ablate import Study

app = typer.Typer(
    name="deepzero",
    help="Zeroth-order training of neural networks from function values alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path | None, typer.Argument(help="TOML file; without it the defaults, which are the main job.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one value, e.g. sparsity.fraction=0.95.", metavar="KEY=VALUE"),
]
ModelName = Annotated[str | None, typer.Option("--model", help="Your own: package.module:factory.")]
ObjectiveName = Annotated[
    str | None,
    typer.Option("--objective", help="package.module:function(model, batch) -> loss; default cross-entropy."),
]
BatchName = Annotated[str | None, typer.Option("--batch", help="package.module:function() -> batch.")]


def main() -> None:
    """The console entry point."""
    app()


@contextlib.contextmanager
def _exit_codes(run: Path | None = None) -> Iterator[None]:
    """One clear message and an exit code instead of a traceback, for errors that are not our own mistakes."""
    try:
        yield
    except KeyboardInterrupt:
        _fail(f"interrupted.{_resume_hint(run)}", 130)
    except BudgetError as error:
        _fail(f"{error}{_resume_hint(run)}", 3)
    except ObjectiveError as error:
        _fail(str(error), 4)
    except DeepZeroError as error:
        _fail(str(error), 2)


def _resume_hint(run: Path | None) -> str:
    return f" Go on with: deepzero resume {run}" if run and (run / "checkpoints" / "last.pt").exists() else ""


def _fail(message: str, code: int) -> None:
    typer.echo(f"deepzero: {message}", err=True)
    raise typer.Exit(code)


@app.command()
def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/<date>-<time>.")] = None,
) -> None:
    """Train a network by zeroth-order gradients, then by first-order ones under the same masks and schedule."""
    from .training.config import load_config
    from .training.launch import start

    place = folder or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    with _exit_codes(place):
        _report(place, start(load_config(config, overrides or ()), place))


@app.command()
def resume(run: Annotated[Path, typer.Argument(help="Folder of the run.")]) -> None:
    """Go on with a run from its last checkpoint, bit for bit."""
    from .training import launch as runs

    with _exit_codes(run):
        _report(run, runs.resume(run))


@app.command()
def ablate(
    name: Annotated[
        str | None, typer.Argument(metavar="[STUDY]", help=f"One of: {', '.join(STUDIES)}; or none, with --sweep.")
    ] = None,
    axes: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep", help="Sweep a key by hand, e.g. estimator.options.mu=5e-3,1e-3,1e-6.", metavar="KEY=VALUE,..."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of every setting, with seeds 0, 1, ...")] = 3,
    metric: Annotated[str | None, typer.Option(help="What the picture shows; default test_accuracy.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file under the study's settings.")] = None,
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option(help="Default runs/ablate-<study>.")] = None,
) -> None:
    """Train one setting after the other, with several seeds, into one table and picture.

    The same command goes on where it was stopped. Give several --sweep for every combination.
    """
    from .report.plots import new_figure, plot_ablation
    from .training import ablate as ablation

    place = folder or Path("runs", f"ablate-{name or 'sweep'}")
    with _exit_codes():
        if (name is None) == (not axes):
            raise ConfigError(f"give one study ({', '.join(STUDIES)}) or --sweep key=value,value,...")
        study = _study(name) if name is not None else ablation.sweep(axes or ())
        if metric is not None:
            study = dataclasses.replace(study, metric=metric)
        new_figure(1, 1)  # a missing matplotlib is found before the work, not after it
        configs = ablation.resolve(study, config, overrides or ())
        try:
            rows = ablation.run(name or "sweep", study, configs, place, seeds=seeds)
        except KeyboardInterrupt:
            _fail("interrupted. The same command goes on from here.", 130)
        picture = plot_ablation(rows, place / "plot.png", title=study.title, metric=study.metric)
        typer.echo(f"{study.title}\n\n{ablation.table(rows)}")
        typer.echo(f"rows {place / 'results.csv'}, table {place / 'table.md'}, picture {picture}")


def _study(name: str) -> Study:
    if name not in STUDIES:
        raise ConfigError(f"study {name!r} is unknown.{did_you_mean(name, STUDIES)} Known: {', '.join(STUDIES)}.")
    return STUDIES[name]


@app.command()
def plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    model: ModelName = None,
    objective: ObjectiveName = None,
    batch: BatchName = None,
    steps: Annotated[bool, typer.Option("--steps", help="Also print what runs, step by step.")] = False,
) -> None:
    """Print how a model's coordinates would be estimated, and what one costs."""
    with _exit_codes():
        estimator, sample = _subject(config, overrides, model, objective, batch)
        plan = estimator.plan(sample)
        typer.echo(f"{plan.steps()}\n{plan}" if steps else str(plan))


@app.command()
def check(
    config: ConfigFile = None,
    overrides: Overrides = None,
    model: ModelName = None,
    objective: ObjectiveName = None,
    batch: BatchName = None,
) -> None:
    """Compare sampled coordinates of a model with float64, layer by layer, and name ops that fell back."""
    with _exit_codes():
        from .report.check import check as compare

        estimator, sample = _subject(config, overrides, model, objective, batch)
        report = compare(
            estimator.model, estimator.objective, sample, mu=estimator.mu, precision=estimator.engine.precision
        )
        typer.echo(str(report))
        if not report.ok:
            raise typer.Exit(1)


@app.command()
def prune(
    config: ConfigFile = None,
    overrides: Overrides = None,
    model: ModelName = None,
    objective: ObjectiveName = None,
    batch: BatchName = None,
    score: Annotated[
        list[str] | None, typer.Option(help="Name of a score; give several to compare. Default zo-grasp-layerwise.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction left out; default sparsity.fraction.")] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Random directions of a score; default 192.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for <score>.json and ratios.png.")] = Path("ratios"),
) -> None:
    """Score a model's weights and print, save and draw how much of each layer to prune.

    sparsity.always_on and sparsity.score_options of the configuration apply; each score takes the options it knows.
    """
    with _exit_codes():
        from .report.plots import plot_ratios
        from .training.config import load_config
        from .training.policies import options_by_score, scored

        changes = [*(overrides or ()), *([] if sparsity is None else [f"sparsity.fraction={sparsity}"])]
        settings = load_config(config, changes)
        names = list(dict.fromkeys(score or ["zo-grasp-layerwise"]))
        asked = settings.sparsity.score_options | ({} if queries is None else {"queries": queries})
        sections = {
            name: settings.sparsity.model_copy(update={"ratios": name, "score_options": options})
            for name, options in options_by_score(names, asked).items()
        }
        estimator, sample = _subject(config, changes, model, objective, batch)
        found = {}
        spent = {}
        for name, section in sections.items():
            configured = settings.model_copy(update={"sparsity": section})
            found[name], _, spent[name] = scored(configured, estimator.model, estimator.objective, sample)
        typer.echo(_ratio_table(found, spent))
        out.mkdir(parents=True, exist_ok=True)
        for name, ratios in found.items():
            ratios.save(out / f"{name}.json")
        typer.echo(f"ratios in {out}, picture {plot_ratios(found, out / 'ratios.png')}")


@app.command()
def info() -> None:
    """Print versions and what the native part was built with."""
    import numpy
    import torch

    import dzkernels

    from . import __version__

    lines = {
        "deepzero": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda or 'none'}",
        "numpy": numpy.__version__,
        "dzkernels": dzkernels.build_info(),
    }
    for name, value in lines.items():
        typer.echo(f"{name:<10} {value}")


def _report(folder: Path, outcomes: list[Any]) -> None:
    from .report.plots import plot_run

    width = max(12, *(len(outcome.label) for outcome in outcomes))
    typer.echo(
        f"{'method':<{width}} {'test accuracy':>13} {'train loss':>11} {'queries':>12} {'queries/s':>10} {'seconds':>8}"
    )
    for outcome in outcomes:
        record = outcome.record
        typer.echo(
            f"{outcome.label:<{width}} {record['test_accuracy']:>13.2%} {record['train_loss']:>11.4f} "
            f"{record['queries']:>12,} {record['queries_per_second']:>10,.0f} {record['seconds']:>8,.1f}"
        )
    typer.echo(f"run folder {folder}, picture {plot_run(folder)}")


def _ratio_table(found: Mapping[str, LayerRatios], spent: Mapping[str, int]) -> str:
    """A row a parameter: for every score the fraction pruned and the number kept."""
    from .text import aligned

    first = next(iter(found.values()))
    rows = [["parameter", "shape", *(cell for name in found for cell in (name, "kept"))]]
    for parameter, shape in first.shapes.items():
        cells = [(f"{r.pruned[parameter]:.4f}", f"{r.kept[parameter]:,}") for r in found.values()]
        rows.append([parameter, "x".join(map(str, shape)) or "scalar", *(cell for pair in cells for cell in pair)])
    size = sum(shape.numel() for shape in first.shapes.values())
    totals = [sum(ratios.kept.values()) for ratios in found.values()]
    rows.append(["all", f"{size:,}", *(cell for kept in totals for cell in (f"{1 - kept / size:.4f}", f"{kept:,}"))])
    values = ", ".join(f"{name} {count:,}" for name, count in spent.items())
    return "\n".join([*aligned(rows), f"loss values spent: {values}"])


def _subject(
    config: Path | None, overrides: list[str] | None, model: str | None, objective: str | None, batch: str | None
) -> tuple[CGE, Any]:
    """(estimator, batch) for the user's own model by import strings, or for the configured one.

    The options of the configuration's estimator are used when it is CGE, the only one that plans and is checked.
    """
    from .training.build import build_estimator, build_loader, build_model, classification_loss, prepare
    from .training.config import EstimatorSection, load_config

    settings = load_config(config, overrides or ())
    if settings.estimator.name != "cge":
        settings = settings.model_copy(update={"estimator": EstimatorSection()})
    loss: Callable[..., Any] = classification_loss
    if model is None and batch is None and objective is None:
        images = prepare(settings)
        network, sample = build_model(settings, images), next(iter(build_loader(settings, images)))
    elif model is not None and batch is not None:
        network, sample = _imported(model, "--model")(), _imported(batch, "--batch")()
        loss = _imported(objective, "--objective") if objective is not None else loss
    else:
        raise ConfigError("give --model and --batch together (and --objective, unless the loss is cross-entropy)")
    return cast("CGE", build_estimator(settings, network, loss)), sample


def _imported(name: str, option: str) -> Callable[..., Any]:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{option} {name}: expected package.module:name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as missing:
        raise ConfigError(f"{option} {name}: {missing}. Run deepzero where {module} can be imported.") from missing
    if not callable(found):
        raise ConfigError(f"{option} {name}: expected something to call, got {type(found).__name__}")
    return found
