"""The training loop: estimate, step, schedule, record, checkpoint."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import BudgetError, CheckpointError, ObjectiveError
from ..estimators.interface import Estimator
from ..sparsity import MaskPolicy
from .checkpoint import random_state, set_random_state
from .masked import masked_step
from .signals import StopRequest

Record = dict[str, Any]
"""Plain values of one step or epoch: event, step, epoch (epochs done, a float), loss or train_loss, queries, ..."""


class Callback:
    """Hooks of :class:`deepzero.training.Trainer`; override those you need."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process."""

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """After every optimizer step."""

    def on_epoch(self, trainer: Trainer, record: Record) -> None:
        """After every epoch and its evaluation."""

    def on_stop(self, trainer: Trainer) -> None:
        """When the run ends early and resumably: a signal, or a spent budget."""

    def on_end(self, trainer: Trainer) -> None:
        """Always, last."""


Evaluate = Callable[[nn.Module], Mapping[str, float]]


class Trainer:
    """Trains ``model`` by the gradients of ``estimator``.

    loader     sized iterable of batches, one epoch per iteration; with ``state_dict`` / ``load_state_dict`` (as
               :class:`deepzero.data.Loader` has) a run can be resumed inside an epoch, bit for bit
    scheduler  any torch scheduler, stepped after every step
    masks      which coordinates each step estimates; None: all with requires_grad
    momentum   what a step does to the coordinates that its mask left out: "dense" moves them on by momentum and weight
               decay, as the paper does; "masked" leaves their weights and optimizer state as they are, bit for bit
    evaluate   ``evaluate(model) -> {name: value}``, called in eval mode without gradients after every epoch
    monitor    the value of ``evaluate`` whose highest value marks the best checkpoint
    config     plain types describing the run, stored in its checkpoints

    ``step``, ``epoch`` (finished ones), ``seconds`` (wall time inside the loop), ``cpu_seconds`` (of all threads, the
    same work on a busy machine), ``best`` and ``best_epoch`` tell how far it got.
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: Estimator,
        optimizer: Optimizer,
        loader: Iterable[Any],
        *,
        epochs: int,
        scheduler: LRScheduler | None = None,
        masks: MaskPolicy | None = None,
        momentum: str = "dense",
        evaluate: Evaluate | None = None,
        monitor: str = "test_accuracy",
        callbacks: Sequence[Callback] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if momentum not in ("dense", "masked"):
            raise ValueError(f"momentum must be 'dense' or 'masked', got {momentum!r}")
        if estimator.model is not model:
            raise ValueError(
                "the estimator is of another model than the one to be trained, whose weights would never get a "
                f"gradient. Make it of this one: {type(estimator).__name__}(model, objective, ...)."
            )
        self.model, self.estimator, self.optimizer, self.loader = model, estimator, optimizer, loader
        self.epochs, self.scheduler, self.masks, self.momentum = epochs, scheduler, masks, momentum
        self.evaluate, self.monitor = evaluate, monitor
        self.callbacks = tuple(callbacks)
        self.config = dict(config or {})
        self.steps_per_epoch: int = len(loader)  # type: ignore[arg-type]
        self.step = 0
        self.epoch = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.estimate_seconds = 0.0
        self.best: float | None = None
        self.best_epoch: int | None = None
        self._epoch_losses: list[float] = []
        self._stop = StopRequest()

    def fit(self) -> None:
        """Train until ``epochs`` are finished.

        On Ctrl-C or SIGTERM the step at hand is finished (abandoned on a second signal), the callbacks write their
        checkpoint and KeyboardInterrupt is raised; a spent budget ends the same way with BudgetError. A loss that is
        not finite raises ObjectiveError and leaves the last checkpoint as it is.
        """
        self._stop = StopRequest()
        with self._stop:
            try:
                for callback in self.callbacks:
                    callback.on_start(self)
                while self.epoch < self.epochs:
                    self._run_epoch()
            except (KeyboardInterrupt, BudgetError):
                for callback in self.callbacks:
                    callback.on_stop(self)
                raise
            finally:
                for callback in self.callbacks:
                    callback.on_end(self)

    def _run_epoch(self) -> None:
        self.model.train()
        batches = iter(self.loader)
        resumable = hasattr(self.loader, "state_dict")
        while True:
            before = self.loader.state_dict() if resumable else None  # type: ignore[attr-defined]
            try:
                batch = next(batches)
            except StopIteration:
                break
            started = _clocks()
            try:
                record = self._run_step(batch)
            except (KeyboardInterrupt, BudgetError):
                if resumable:
                    self.loader.load_state_dict(before)  # type: ignore[attr-defined]
                raise
            self._count(started)
            for callback in self.callbacks:
                callback.on_step(self, record)
            if self._stop.requested:
                raise KeyboardInterrupt
        started = _clocks()
        record = self._finish_epoch()
        self._count(started)
        record |= {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        for callback in self.callbacks:
            callback.on_epoch(self, record)

    def _run_step(self, batch: Any) -> Record:
        mask = None if self.masks is None else self.masks.sample(self.step)
        self.optimizer.zero_grad()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        started = time.perf_counter()
        self._stop.abandonable = True
        try:
            result = self.estimator.backward(batch, mask=mask)
        finally:
            self._stop.abandonable = False
        elapsed = time.perf_counter() - started
        if not math.isfinite(result.loss):
            raise ObjectiveError(f"the loss at step {self.step} is {result.loss}. Lower the learning rate or mu.")
        if mask is None or self.momentum == "dense":
            self.optimizer.step()
        else:
            masked_step(self.optimizer, self.model, mask)
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        self.estimate_seconds += elapsed
        self._epoch_losses.append(result.loss)
        return {
            "event": "step",
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "loss": result.loss,
            "lr": learning_rate,
            "queries": self.estimator.queries,
            "queries_per_second": result.queries / elapsed,
        }

    def _finish_epoch(self) -> Record:
        found: Mapping[str, float] = {}
        if self.evaluate is not None:
            self.model.eval()
            with torch.no_grad():
                found = self.evaluate(self.model)
            self.model.train()
        self.epoch += 1
        value = found.get(self.monitor)
        if value is not None and (self.best is None or value > self.best):
            self.best, self.best_epoch = value, self.epoch
        losses, self._epoch_losses = self._epoch_losses, []
        return {
            "event": "epoch",
            "step": self.step,
            "epoch": float(self.epoch),
            "train_loss": math.fsum(losses) / max(1, len(losses)),
            **found,
            "queries": self.estimator.queries,
            "queries_per_second": self.queries_per_second,
        }

    def _count(self, started: tuple[float, float]) -> None:
        wall, cpu = _clocks()
        self.seconds += wall - started[0]
        self.cpu_seconds += cpu - started[1]

    @property
    def queries_per_second(self) -> float:
        """Queries per second of estimation, over the whole run."""
        return self.estimator.queries / self.estimate_seconds if self.estimate_seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit for bit; tensors and plain types only."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "estimator": self.estimator.state_dict(),
            "masks": None if self.masks is None else self.masks.state_dict(),
            "rng": random_state(),
            "loader": self.loader.state_dict() if hasattr(self.loader, "state_dict") else None,
            "counters": {
                "step": self.step,
                "epoch": self.epoch,
                "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds,
                "estimate_seconds": self.estimate_seconds,
                "epoch_losses": list(self._epoch_losses),
            },
            "best": {"value": self.best, "epoch": self.best_epoch},
            "config": self.config,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken. Raises CheckpointError when it belongs to another model or optimizer."""
        self._check_model(state["model"])
        if (state["loader"] is None) != (not hasattr(self.loader, "load_state_dict")) or (
            state["loader"] is None and state["counters"]["epoch_losses"]
        ):
            raise CheckpointError(
                f"the checkpoint was taken after step {state['counters']['step']}, inside an epoch or with another "
                "kind of loader; this loader cannot go on from there. Use a loader with state_dict and "
                "load_state_dict, such as deepzero.data.Loader."
            )
        for name, ours, theirs in (
            ("scheduler", self.scheduler, state["scheduler"]),
            ("mask policy", self.masks, state["masks"]),
        ):
            if (ours is None) != (theirs is None):
                has, lacks = ("the trainer", "the checkpoint") if theirs is None else ("the checkpoint", "the trainer")
                raise CheckpointError(f"{has} has a {name} and {lacks} has none: it belongs to another run.")
        # what may refuse comes before what moves weights
        if state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as other:
            raise CheckpointError(
                f"the checkpoint's optimizer does not fit this {type(self.optimizer).__name__}: {other}"
            ) from other
        self.model.load_state_dict(state["model"])
        self.estimator.load_state_dict(state["estimator"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.masks is not None:
            self.masks.load_state_dict(state["masks"])
        counters = state["counters"]
        self.step, self.epoch = counters["step"], counters["epoch"]
        self.seconds, self.estimate_seconds = counters["seconds"], counters["estimate_seconds"]
        self.cpu_seconds = counters["cpu_seconds"]
        self._epoch_losses = list(counters["epoch_losses"])
        self.best, self.best_epoch = state["best"]["value"], state["best"]["epoch"]
        set_random_state(state["rng"])

    def _check_model(self, saved: Mapping[str, Any]) -> None:
        ours = {name: tuple(t.shape) for name, t in self.model.state_dict().items()}
        theirs = {name: tuple(t.shape) for name, t in saved.items()}
        if ours != theirs:
            name = next(n for n in [*ours, *theirs] if ours.get(n) != theirs.get(n))
            raise CheckpointError(
                f"the checkpoint belongs to another model: {name} has shape {theirs.get(name, 'none')} in the "
                f"checkpoint and {ours.get(name, 'none')} in the model. Resume with the model it was taken from."
            )


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
