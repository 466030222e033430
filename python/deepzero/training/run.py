"""A run from a configuration: data, model, estimator and trainer, in a folder that can be resumed."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .. import data
from ..baselines import Backprop, PlainLoop
from ..data import ImageData, Loader
from ..errors import CheckpointError, ConfigError, DeepZeroError
from ..estimators import CGE, RGE, Estimator, Objective
from ..models import MODELS
from ..sparsity import UniformRandom
from . import checkpoint
from .callbacks import Callback, Checkpoints, Metrics, Progress, Record, TensorBoard, read_metrics
from .config import Config, load_config, to_toml
from .schedule import warmup_cosine
from .trainer import Trainer

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "cge": CGE,
    "rge": RGE,
    "plain-loop": PlainLoop,
    "backprop": Backprop,
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    # LBFGS needs the loss again at moved weights, SparseAdam sparse gradients
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")
}
FIRST_ORDER = "first-order"
"""Folder, inside a run's own, of the first-order run it is compared with."""


@dataclass(frozen=True)
class Outcome:
    """How one training ended: its last epoch's record and the queries per second of the whole run."""

    label: str
    record: Record


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of ``model(images)`` [n, classes] against ``labels`` [n]."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def build_model(config: Config, images: ImageData) -> nn.Module:
    """The configured network for ``images``, initialised from the configuration's seed."""
    factory = _chosen("model", config.model.name, MODELS)
    shape = {"in_channels": images.in_channels, "image_size": images.image_size, "num_classes": images.num_classes}
    options = _options("model", config.model.name, factory, config.model.options, reserved=shape)
    accepted = inspect.signature(factory).parameters
    torch.manual_seed(config.seed)
    model = _made("model", config.model.name, factory, **{k: v for k, v in shape.items() if k in accepted}, **options)
    return cast("nn.Module", model).to(config.device)


def build_estimator(config: Config, model: nn.Module, objective: Objective = classification_loss) -> Estimator:
    """The configured estimator; raises ConfigError for unknown options and values that it refuses."""
    section = config.estimator
    factory = _chosen("estimator", section.name, ESTIMATORS)
    options = _options("estimator", section.name, factory, section.options, reserved=("model", "objective", "budget"))
    made = _made("estimator", section.name, factory, model, objective, budget=section.budget, **options)
    return cast("Estimator", made)


def build_loader(config: Config, images: ImageData) -> Loader:
    return Loader(
        images.train_images.to(config.device),
        images.train_labels.to(config.device),
        config.data.batch_size,
        seed=config.seed,
        crop=config.data.crop,
        flip=config.data.flip,
        fill=images.black,
    )


def build_trainer(
    config: Config, images: ImageData, folder: Path, *, first_order: bool, progress: Callback | None = None
) -> Trainer:
    """The trainer of a configuration, or of first-order training under the same masks, seeds and schedule."""
    model = build_model(config, images)
    loader = build_loader(config, images)
    factory = _chosen("optimizer", config.optimizer.name, OPTIMIZERS)
    options = _options("optimizer", config.optimizer.name, factory, config.optimizer.options, reserved=("params",))
    optimizer = cast("Optimizer", _made("optimizer", config.optimizer.name, factory, model.parameters(), **options))
    progress = progress or Progress(_label(config, first_order=first_order))
    callbacks: list[Callback] = [Metrics(folder / "metrics.jsonl"), progress]
    if config.tensorboard:
        callbacks.append(TensorBoard(folder / "tensorboard"))
    callbacks.append(Checkpoints(folder / "checkpoints", every=config.checkpoint_every))
    return Trainer(
        model,
        Backprop(model, classification_loss) if first_order else build_estimator(config, model),
        optimizer,
        loader,
        epochs=config.epochs,
        scheduler=_scheduler(config, optimizer, len(loader)),
        masks=UniformRandom(model, config.sparsity.fraction, config.sparsity.every, config.seed),
        evaluate=_classification_test(images, config.device),
        callbacks=callbacks,
        config=config.model_dump(),
    )


def start(config: Config, folder: Path, *, progress: Callback | None = None) -> list[Outcome]:
    """Train from scratch in a new ``folder``, which from then on can be resumed; ``progress`` replaces the bar."""
    if (folder / "config.toml").exists():
        raise ConfigError(
            f"{folder} already holds a run. Resume it (deepzero resume {folder}), or choose another folder."
        )
    trainers = _trainers(config, prepare(config), folder, progress)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return _train(config, trainers, resume=False)


def resume(folder: Path, *, progress: Callback | None = None) -> list[Outcome]:
    """Go on with the run in ``folder`` from its last checkpoint."""
    if not (folder / "config.toml").exists():
        raise CheckpointError(f"{folder} holds no run: there is no config.toml in it. Give the folder of a run.")
    config = load_config(folder / "config.toml")
    return _train(config, _trainers(config, prepare(config), folder, progress), resume=True)


def prepare(config: Config) -> ImageData:
    torch.set_num_threads(config.threads)
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as refused:  # torch built without CUDA asserts
        raise ConfigError(f"device = {config.device!r} cannot be used: {refused}") from refused
    return data.load(config.data.name, folder=config.data.folder, seed=config.seed)


def _trainers(config: Config, images: ImageData, folder: Path, progress: Callback | None) -> dict[Path, Trainer]:
    """Folder -> trainer, the zeroth-order one first; all are built before any work, so that a mistake costs no run."""
    places = {folder: False, folder / FIRST_ORDER: True}
    return {
        place: build_trainer(config, images, place, first_order=first_order, progress=progress)
        for place, first_order in places.items()
        if config.first_order or not first_order
    }


def _train(config: Config, trainers: Mapping[Path, Trainer], *, resume: bool) -> list[Outcome]:
    outcomes = []
    for number, (place, trainer) in enumerate(trainers.items()):
        last = place / "checkpoints" / "last.pt"
        if resume and (last.exists() or number == 0):
            trainer.load_state_dict(checkpoint.load(last))
        else:
            torch.manual_seed(config.seed)
        trainer.fit()
        epochs = [record for record in read_metrics(place / "metrics.jsonl") if record["event"] == "epoch"]
        outcomes.append(Outcome(_label(config, first_order=number == 1), epochs[-1]))
    return outcomes


def _label(config: Config, *, first_order: bool) -> str:
    return FIRST_ORDER if first_order else config.estimator.name


def _scheduler(config: Config, optimizer: Optimizer, steps_per_epoch: int) -> LambdaLR | None:
    if config.schedule.name == "constant":
        return None
    warmup = round(config.schedule.warmup_epochs * steps_per_epoch)
    total = config.epochs * steps_per_epoch
    if warmup >= total:
        raise ConfigError(
            f"schedule.warmup_epochs = {config.schedule.warmup_epochs} takes {warmup} steps, the run only has {total}. "
            "Lower it, or raise epochs."
        )
    return warmup_cosine(optimizer, total_steps=total, warmup_steps=warmup)


def _classification_test(images: ImageData, device: str) -> Callable[[nn.Module], dict[str, float]]:
    inputs, labels = images.test_images.to(device), images.test_labels.to(device)

    def test(model: nn.Module) -> dict[str, float]:
        logits = torch.cat([model(part) for part in inputs.split(500)])
        return {
            "test_loss": float(F.cross_entropy(logits, labels)),
            "test_accuracy": float((logits.argmax(1) == labels).float().mean()),
        }

    return test


def _chosen(section: str, name: str, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if name not in known:
        hint = _near(name, list(known))
        raise ConfigError(f"{section}.name = {name!r} is unknown.{hint} Known: {', '.join(known)}.")
    return known[name]


def _options(
    section: str, name: str, factory: Callable[..., Any], options: Mapping[str, Any], *, reserved: Any
) -> dict[str, Any]:
    """``options`` checked against the factory's own keyword arguments."""
    free = [key for key in inspect.signature(factory).parameters if key not in reserved]
    for key in options:
        if key not in free:
            raise ConfigError(
                f"{section}.options.{key} is not an option of {name}.{_near(key, free)} Options: "
                f"{', '.join(free) or 'none'}."
            )
    return cast("dict[str, Any]", dict(options))


def _made(section: str, name: str, factory: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """What ``factory`` makes; a value it refuses is the configuration's mistake."""
    try:
        return factory(*given, **options)
    except DeepZeroError:
        raise
    except (TypeError, ValueError) as refused:
        raise ConfigError(f"{section}.options do not suit {name}: {refused}") from refused


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
