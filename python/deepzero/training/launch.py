"""A run in a folder: started from a configuration, and resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data import ImageData
from ..errors import CheckpointError, ConfigError
from . import checkpoint
from .build import BEST, COSTS, RATIOS, build_trainer, first_order_config, mask_inputs, prepare
from .callbacks import read_metrics
from .config import FIRST_ORDER, Config, load_config, to_toml
from .policies import (
    MaskInputs,
    check_sparsity,
    write_costs,
)
from .trainer import Callback, Record, Trainer


@dataclass(frozen=True)
class Outcome:
    """How one training ended: its last epoch's record and the queries per second of the whole run."""

    label: str
    record: Record


def start(config: Config, folder: Path, *, progress: Callback | None = None) -> list[Outcome]:
    """Train from scratch in a new ``folder``, which from then on can be resumed; ``progress`` replaces the bar."""
    if (folder / "config.toml").exists():
        raise ConfigError(
            f"{folder} already holds a run. Resume it (deepzero resume {folder}), or choose another folder."
        )
    check_sparsity(config)
    images = prepare(config)
    inputs = mask_inputs(config, images)
    trainers = _trainers(config, images, folder, inputs, progress)
    next(iter(trainers.values()))[1].estimator.queries += inputs.queries
    folder.mkdir(parents=True, exist_ok=True)
    if inputs.ratios is not None:
        inputs.ratios.save(folder / RATIOS)
    if inputs.best is not None:
        checkpoint.save({"mask": inputs.best}, folder / BEST)
    if inputs.costs is not None:
        write_costs(inputs.costs, folder / COSTS)
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return _train(config, trainers, resume=False)


def resume(folder: Path, *, progress: Callback | None = None) -> list[Outcome]:
    """Go on with the run in ``folder`` from its last checkpoint."""
    if not (folder / "config.toml").exists():
        raise CheckpointError(f"{folder} holds no run: there is no config.toml in it. Give the folder of a run.")
    config = load_config(folder / "config.toml")
    images = prepare(config)
    trainers = _trainers(config, images, folder, mask_inputs(config, images, folder), progress)
    return _train(config, trainers, resume=True)


def _trainers(
    config: Config, images: ImageData, folder: Path, inputs: MaskInputs, progress: Callback | None
) -> dict[str, tuple[Path, Trainer]]:
    """Label -> folder and trainer, the run's own first; all are built before any work: a mistake costs no run."""
    runs = {config.estimator.name: (config, folder)}
    for method in _first_order_methods(config):
        runs[FIRST_ORDER[method]] = (first_order_config(config, method), folder / FIRST_ORDER[method])
    return {
        label: (place, build_trainer(own, images, place, label=label, inputs=inputs, progress=progress))
        for label, (own, place) in runs.items()
    }


def _first_order_methods(config: Config) -> Sequence[str]:
    if isinstance(config.first_order, list):
        return config.first_order
    same = "sparse-weight" if config.sparsity.weights == "sparse" else "sparse-gradient"
    return [same] if config.first_order else []


def _train(config: Config, trainers: Mapping[str, tuple[Path, Trainer]], *, resume: bool) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for label, (place, trainer) in trainers.items():
        last = place / "checkpoints" / "last.pt"
        if resume and (last.exists() or not outcomes):
            trainer.load_state_dict(checkpoint.load(last))
        else:
            torch.manual_seed(config.seed)
        trainer.fit()
        epochs = [record for record in read_metrics(place / "metrics.jsonl") if record["event"] == "epoch"]
        outcomes.append(Outcome(label, epochs[-1]))
    return outcomes
