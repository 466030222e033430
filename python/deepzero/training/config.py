"""The configuration of a run: typed sections, TOML files, ``key=value`` overrides. Its defaults are the main job."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import ConfigError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]


FIRST_ORDER = {
    "sparse-gradient": "first-order",
    "dense": "first-order-dense",
    "sparse-weight": "first-order-sparse-weight",
}
"""Method of a first-order run -> its label, and its folder inside that of the run it is compared with."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """A name from ``deepzero.models.MODELS`` and the keyword arguments of that factory."""

    name: str = "paper-cnn"
    options: dict[str, Any] = Field(default_factory=lambda: {"depth": 3})


class DataSection(Section):
    """A data set and how it is cut into mini-batches; crop is in pixels of padding, folder where its files are."""

    name: str = "digits"
    folder: str | None = None
    batch_size: int = Field(64, ge=1)
    crop: int = Field(0, ge=0)
    flip: bool = False


class EstimatorSection(Section):
    """The gradient estimator, the most queries it may spend, and its own keyword arguments."""

    name: str = "cge"
    budget: int | None = Field(None, ge=1)
    options: dict[str, Any] = Field(default_factory=lambda: {"mu": 5e-3})


class SparsityScheduleSection(Section):
    """Sparsity over training: from ``start`` at ``begin_epoch`` to ``sparsity.fraction`` so many ``epochs`` later.

    epochs  None: the rest of the run
    """

    name: Literal["constant", "linear", "cosine", "cubic"] = "constant"
    start: float = Field(0.0, ge=0, lt=1)
    begin_epoch: float = Field(0.0, ge=0)
    epochs: float | None = Field(None, gt=0)


class SparsitySection(Section):
    """Which coordinates each step estimates, and what happens to the others.

    policy         a key of ``deepzero.training.policies.POLICIES``
    fraction       of the coordinates left out of each estimate, at the end of the schedule
    every          steps between draws, or "epoch"
    always_on      "norm", "bias" and patterns of parameter names: these parameters are never left out
    ratios         layer-wise ratios: the name of a score, as "zo-grasp-layerwise" or "erk", or a JSON file of ratios
    score_options  keyword arguments of the score, and keep and least of ``deepzero.sparsity.layer_ratios``
    costs          for policy = "cost-aware", a JSON file of costs by parameter; None: measured when the run starts
    options        keyword arguments of the policy: of "cost-aware" exponent and budget
    momentum       "dense": momentum and weight decay go on moving what a mask left out; "masked": it keeps still,
                   weights and optimizer state
    weights        "sparse": weights outside a fixed mask are zero and stay zero; norm and bias are always on. With a
                   score as ratios the mask is what the score ranks best, else a random draw
    """

    policy: str = "uniform"
    fraction: float = Field(0.9, ge=0, lt=1)
    every: int | str = 1
    always_on: list[str] = []
    ratios: str | None = None
    score_options: dict[str, Any] = {}
    costs: str | None = None
    options: dict[str, Any] = {}
    momentum: Literal["dense", "masked"] = "dense"
    weights: Literal["dense", "sparse"] = "dense"
    schedule: SparsityScheduleSection = SparsityScheduleSection()

    @field_validator("every", mode="before")
    @classmethod
    def _steps(cls, value: Any) -> Any:
        if value == "epoch" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError("expected a number of steps, at least 1, or 'epoch'")


class OptimizerSection(Section):
    """A class of ``torch.optim`` and its keyword arguments."""

    name: str = "SGD"
    options: dict[str, Any] = Field(default_factory=lambda: {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4})


class ScheduleSection(Section):
    """Learning rate by step: linear warm-up, then cosine to zero, or constant."""

    name: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = Field(0.0, ge=0)


class Config(Section):
    """Everything that decides a run.

    first_order       also train by backpropagation with the same seeds and schedule, for comparison: true, under the
                      same masks; or a list of methods, "dense" (no mask), "sparse-gradient" (the same masks) and
                      "sparse-weight" (weights outside a fixed mask of the same sparsity are zero)
    checkpoint_every  steps between checkpoints, besides one at every end of an epoch; 0: only those
    threads           torch's threads; 1 suits small networks, whose threads would wait for each other more than they
                      work, and by far so on a busy machine
    """

    seed: int = Field(0, ge=0)
    epochs: int = Field(30, ge=1)
    device: str = "cpu"
    threads: int = Field(1, ge=1)
    first_order: bool | list[str] = True
    tensorboard: bool = True
    checkpoint_every: int = Field(0, ge=0)
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    estimator: EstimatorSection = EstimatorSection()
    sparsity: SparsitySection = SparsitySection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()

    @field_validator("first_order", mode="before")
    @classmethod
    def _methods(cls, value: Any) -> Any:
        known = isinstance(value, list) and all(method in FIRST_ORDER for method in value)
        if isinstance(value, bool) or (known and len(set(value)) == len(value)):
            return value
        raise ValueError(f"expected true, false or a list of different ones of {', '.join(map(repr, FIRST_ORDER))}")


def load_config(path: Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration in ``path`` (or the defaults), with ``a.b=value`` overrides applied; values are TOML.

    Raises ConfigError for a missing or unreadable file, unknown keys (naming the nearest) and unusable values.
    """
    source = str(path) if path else "the command line"
    content: dict[str, Any] = {}
    if path is not None:
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as missing:
            raise ConfigError(f"{path}: there is no such file. Give the path of a TOML file.") from missing
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as broken:
            raise ConfigError(f"{path}: expected a TOML file, reading it failed with: {broken}") from broken
    for override in overrides:
        _apply(content, override)
    try:
        return Config.model_validate(content)
    except ValidationError as invalid:
        raise ConfigError("\n".join(f"{source}: {_explained(e)}" for e in invalid.errors())) from invalid


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override}: expected section.key=value, for example --set sparsity.fraction=0.9")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    content[last] = value


def _explained(error: Mapping[str, Any]) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        return f"{where} = {error['input']!r}: {message[0].lower()}{message[1:]}"
    section: Any = Config
    for part in error["loc"][:-1]:
        section = section.model_fields[part].annotation
    prefix = "".join(f"{part}." for part in error["loc"][:-1])
    keys = [prefix + key for key in section.model_fields]
    return f"{where} is not a key.{did_you_mean(where, keys)} Keys here: {', '.join(keys)}."


def to_toml(config: Config) -> str:
    """``config`` as a TOML file that :func:`load_config` reads back; keys that are None are left out."""
    return _table(config.model_dump(exclude_none=True), "").lstrip("\n")


def _table(content: Mapping[str, Any], prefix: str) -> str:
    values = [f"{key} = {_value(v)}\n" for key, v in content.items() if not isinstance(v, dict)]
    tables = [
        f"\n[{prefix}{key}]\n" + _table(v, f"{prefix}{key}.") for key, v in content.items() if isinstance(v, dict)
    ]
    return "".join(values + tables)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return repr(value)  # json would write NaN and Infinity, which TOML spells nan and inf
    return json.dumps(value)
