"""What a run shows and keeps: progress, metrics, TensorBoard, checkpoints."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..errors import ConfigError, ObjectiveError
from . import checkpoint

if TYPE_CHECKING:
    from .trainer import Trainer
from .trainer import Callback, Record


class Progress(Callback):
    """A tqdm bar with ETA, loss and queries/s on a terminal; elsewhere a line every ``seconds``; a line every epoch.

    part  of something larger that keeps its own record: no line at an epoch, and the bar vanishes at its end
    """

    def __init__(self, label: str, *, stream: IO[str] | None = None, seconds: float = 30.0, part: bool = False) -> None:
        self.label, self.seconds, self.part = label, seconds, part
        self._stream = stream
        self._bar: Any = None
        self._last = time.monotonic()

    @property
    def stream(self) -> IO[str]:
        return sys.stderr if self._stream is None else self._stream

    def on_start(self, trainer: Trainer) -> None:
        if self.stream.isatty():
            total = trainer.epochs * trainer.steps_per_epoch
            self._bar = tqdm(
                total=total,
                initial=trainer.step,
                desc=self.label,
                unit="step",
                file=self.stream,
                leave=not self.part,
            )

    def on_step(self, trainer: Trainer, record: Record) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {record['loss']:.4f}, {record['queries_per_second']:,.0f} queries/s", refresh=False
            )
            self._bar.update()
        elif time.monotonic() - self._last >= self.seconds:
            left = (trainer.epochs * trainer.steps_per_epoch - trainer.step) * trainer.seconds / trainer.step
            self._line(
                f"step {trainer.step:,} of {trainer.epochs * trainer.steps_per_epoch:,}, loss {record['loss']:.4f}, "
                f"{record['queries_per_second']:,.0f} queries/s, {left:,.0f} s left"
            )

    def on_epoch(self, trainer: Trainer, record: Record) -> None:
        if self.part:
            return
        values = [f"{name} {record[name]:.4f}" for name in record if name.startswith(("train_", "test_"))]
        self._line(f"epoch {trainer.epoch} of {trainer.epochs}, {', '.join(values)}, {record['queries']:,} queries")

    def on_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, text: str) -> None:
        self._last = time.monotonic()
        if self._bar is not None:
            self._bar.write(f"{self.label}: {text}", file=self.stream)
        else:
            self.stream.write(f"{self.label}: {text}\n")
            self.stream.flush()


class Metrics(Callback):
    """One JSON object a line for every step and epoch; a resumed run first drops the lines its checkpoint lacks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def on_start(self, trainer: Trainer) -> None:
        kept = [
            json.dumps(record) + "\n"
            for record in (read_metrics(self.path) if self.path.exists() else [])
            if record["step"] <= trainer.step and (record["event"] != "epoch" or record["epoch"] <= trainer.epoch)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.path)
        # written a line at a time, so that a kill loses none
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def on_step(self, trainer: Trainer, record: Record) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record) + "\n")

    on_epoch = on_step

    def on_end(self, trainer: Trainer) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics file; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as broken:
            if number < len(lines):
                raise ConfigError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}") from broken
    return records


class TensorBoard(Callback):
    """Scalars for TensorBoard, by step."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as missing:
            raise ConfigError(
                "tensorboard is not installed: pip install 'deepzero[train]', or set tensorboard = false"
            ) from missing
        self._writer_type = SummaryWriter
        self.folder = folder
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        self._writer = self._writer_type(str(self.folder), purge_step=trainer.step + 1)  # type: ignore[no-untyped-call]

    def on_step(self, trainer: Trainer, record: Record) -> None:
        for name, value in record.items():
            if name not in ("event", "step", "epoch"):
                self._writer.add_scalar(name, value, record["step"])

    on_epoch = on_step

    def on_end(self, trainer: Trainer) -> None:
        if self._writer is not None:
            self._writer.close()


class Checkpoints(Callback):
    """``last.pt`` at the start, every ``every`` steps, every epoch and on an early stop; the one before; the best."""

    def __init__(self, folder: Path, *, every: int = 0) -> None:
        self.folder, self.every = folder, every

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"

    def on_start(self, trainer: Trainer) -> None:
        if trainer.step == 0:
            self._save(trainer)

    def on_step(self, trainer: Trainer, record: Record) -> None:
        if self.every and trainer.step % self.every == 0:
            self._save(trainer)

    def on_epoch(self, trainer: Trainer, record: Record) -> None:
        self._save(trainer)
        if trainer.best_epoch == trainer.epoch:
            checkpoint.copy(self.last, self.folder / "best.pt")

    def on_stop(self, trainer: Trainer) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        for name, parameter in trainer.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ObjectiveError(
                    f"{name} is not finite after step {trainer.step}; the checkpoint in {self.folder} was left as it "
                    "is. Lower the learning rate or mu and resume from there."
                )
        checkpoint.save(trainer.state_dict(), self.last)
