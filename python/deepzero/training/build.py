"""A run from a configuration: data, model, estimator and trainer, in a folder that can be resumed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .. import data
from ..baselines import BASELINES
from ..data import ImageData, Loader
from ..errors import ConfigError, MaskError
from ..estimators import CGE, ESTIMATORS, Estimator, Objective
from ..models import MODELS
from ..objective import selected
from ..sparsity import prune
from . import checkpoint
from .callbacks import Checkpoints, Metrics, Progress, TensorBoard
from .config import Config, EstimatorSection, SparsitySection
from .factories import checked_options, chosen, made
from .masked import masked_step
from .policies import (
    MaskInputs,
    build_masks,
    check_sparsity,
    checked_ratios,
    is_file,
    read_costs,
    read_ratios,
    scored,
)
from .schedule import warmup_cosine
from .trainer import Callback, Trainer

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    # LBFGS needs the loss again at moved weights, SparseAdam sparse gradients
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")
}
RATIOS, BEST, COSTS = "ratios.json", "best-mask.pt", "costs.json"
"""Files, in a run's folder, that its masks follow: layer-wise ratios, the best coordinates of their score, costs."""


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of ``model(images)`` [n, classes] against ``labels`` [n]."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def build_model(config: Config, images: ImageData) -> nn.Module:
    """The configured network for ``images``, initialised from the configuration's seed."""
    factory = chosen("model", config.model.name, MODELS)
    shape = {"in_channels": images.in_channels, "image_size": images.image_size, "num_classes": images.num_classes}
    options = checked_options("model", config.model.name, factory, config.model.options, reserved=shape)
    accepted = inspect.signature(factory).parameters
    torch.manual_seed(config.seed)
    model = made("model", config.model.name, factory, **{k: v for k, v in shape.items() if k in accepted}, **options)
    return cast("nn.Module", model).to(config.device)


def build_estimator(config: Config, model: nn.Module, objective: Objective = classification_loss) -> Estimator:
    """The configured estimator; raises ConfigError for unknown options and values that it refuses."""
    section = config.estimator
    factory = chosen("estimator", section.name, ESTIMATORS | BASELINES)
    reserved = ("model", "objective", "budget")
    options = checked_options("estimator", section.name, factory, section.options, reserved=reserved)
    found = made("estimator", section.name, factory, model, objective, budget=section.budget, **options)
    return cast("Estimator", found)


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


def build_optimizer(config: Config, parameters: Iterable[nn.Parameter]) -> Optimizer:
    section = config.optimizer
    factory = chosen("optimizer", section.name, OPTIMIZERS)
    options = checked_options("optimizer", section.name, factory, section.options, reserved=("params",))
    return cast("Optimizer", made("optimizer", section.name, factory, parameters, **options))


def first_order_config(config: Config, method: str) -> Config:
    """The first-order run, by a method of FIRST_ORDER, that a zeroth-order run of ``config`` is compared with."""
    own = config.sparsity
    sparsity = {
        "sparse-gradient": own.model_copy(update={"weights": "dense"}),
        "dense": SparsitySection(fraction=0.0),
        "sparse-weight": SparsitySection(
            policy="fixed",
            fraction=own.fraction,
            always_on=own.always_on,
            ratios=own.ratios,
            score_options=own.score_options,
            weights="sparse",
        ),
    }[method]
    backprop = EstimatorSection(name="backprop", options={})
    return config.model_copy(update={"estimator": backprop, "sparsity": sparsity, "first_order": False})


def mask_inputs(config: Config, images: ImageData, folder: Path | None = None) -> MaskInputs:
    """What the masks of a configuration are made from: as ``folder``, that of a run, keeps it, or found out now."""
    section = config.sparsity
    if section.ratios is None and section.policy != "cost-aware":
        return MaskInputs()
    model = build_model(config, images)
    batch = next(iter(build_loader(config, images)))
    ratios, best, queries, costs = None, None, 0, None
    if section.ratios is not None:
        if folder is not None and (folder / RATIOS).exists():
            ratios = read_ratios(folder / RATIOS, model)
            best = _read_best(folder / BEST, model) if (folder / BEST).exists() else None
        elif is_file(section.ratios):
            ratios = checked_ratios(read_ratios(Path(section.ratios), model), section)
        else:
            ratios, best, queries = scored(config, model, classification_loss, batch)
    if section.policy == "cost-aware":
        if folder is not None and (folder / COSTS).exists():
            costs = read_costs(folder / COSTS)
        elif section.costs is not None:
            costs = read_costs(Path(section.costs))
        else:
            costs = _planner(config, model).plan(batch).costs
    return MaskInputs(ratios, best, costs, queries)


def _read_best(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The best-scored coordinates that a run keeps; ConfigError where they are no mask of all of ``model``."""
    best = checkpoint.load(path).get("mask") or {}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and name not in best]
    try:
        if missing:
            raise MaskError(f"it has no mask of {missing[0]!r}.")
        selected(model, best)
    except MaskError as refused:
        raise ConfigError(
            f"{path} is for another model: {refused} Restore the file that the run wrote, or start a new run."
        ) from refused
    return best


def _planner(config: Config, model: nn.Module) -> CGE:
    estimator = build_estimator(config, model)
    if not isinstance(estimator, CGE):
        raise ConfigError(
            f"sparsity.policy = 'cost-aware' needs the costs of single coordinates, which estimator.name = "
            f"{config.estimator.name!r} does not measure. Use estimator.name = 'cge', or give a file as sparsity.costs."
        )
    return estimator


def build_trainer(
    config: Config,
    images: ImageData,
    folder: Path,
    *,
    label: str | None = None,
    inputs: MaskInputs | None = None,
    progress: Callback | None = None,
) -> Trainer:
    """The trainer of a configuration, with its records and checkpoints in ``folder``.

    ``inputs`` are what its masks are made from, where several runs share them; ``label`` names it in its progress.
    """
    check_sparsity(config)
    model = build_model(config, images)
    loader = build_loader(config, images)
    masks = build_masks(config, model, len(loader), inputs or mask_inputs(config, images))
    if config.sparsity.weights == "sparse":
        try:
            prune(model, masks.sample(0))
        except MaskError as refused:
            raise ConfigError(f"sparsity.weights = 'sparse' does not suit the model: {refused}") from refused
    still = config.sparsity.momentum == "masked" or config.sparsity.weights == "sparse"
    if still:
        _try_masked_step(config)
    optimizer = build_optimizer(config, model.parameters())
    callbacks: list[Callback] = [
        Metrics(folder / "metrics.jsonl"),
        progress or Progress(label or config.estimator.name),
    ]
    if config.tensorboard:
        callbacks.append(TensorBoard(folder / "tensorboard"))
    callbacks.append(Checkpoints(folder / "checkpoints", every=config.checkpoint_every))
    return Trainer(
        model,
        build_estimator(config, model),
        optimizer,
        loader,
        epochs=config.epochs,
        scheduler=_scheduler(config, optimizer, len(loader)),
        masks=masks,
        momentum="masked" if still else "dense",
        evaluate=_classification_test(images, config.device),
        callbacks=callbacks,
        config=config.model_dump(),
    )


def prepare(config: Config) -> ImageData:
    torch.set_num_threads(config.threads)
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as refused:  # torch built without CUDA asserts
        raise ConfigError(f"device = {config.device!r} cannot be used: {refused}") from refused
    return data.load(config.data.name, folder=config.data.folder, seed=config.seed)


def _try_masked_step(config: Config) -> None:
    """Raise ConfigError for an optimizer whose state cannot be held still by coordinate: a step of it on zeros."""
    trial = nn.Linear(3, 2, bias=False)
    trial.weight.grad = torch.zeros_like(trial.weight)
    outside = {"weight": torch.zeros(2, 3, dtype=torch.bool)}
    try:
        masked_step(build_optimizer(config, trial.parameters()), trial, outside)
    except MaskError as refused:
        raise ConfigError(f"sparsity.momentum does not suit optimizer.name: {refused}") from refused


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
