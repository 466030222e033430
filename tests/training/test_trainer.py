"""The loop: schedule, masks, records, callbacks, and ends that leave a good checkpoint."""

from __future__ import annotations

import io
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepzero.baselines import Backprop
from deepzero.errors import BudgetError, ConfigError, ObjectiveError
from deepzero.estimators.interface import StepResult
from deepzero.training import Callback, Checkpoints, Progress, TensorBoard, Trainer, checkpoint, warmup_cosine

sys.path.insert(0, str(Path(__file__).parent))
import resumable


def objective(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def regression(**options):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    x = torch.randn(8, 2)
    batches = [(x[:4], x[:4].sum(1, keepdim=True)), (x[4:], x[4:].sum(1, keepdim=True))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options.setdefault("estimator", Backprop(model, objective))
    return Trainer(model, optimizer=optimizer, loader=batches, epochs=30, **options)


def test_warmup_then_cosine():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = warmup_cosine(optimizer, total_steps=10, warmup_steps=4)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:] == pytest.approx([1 + math.cos(math.pi * k / 6) for k in range(6)])
    assert optimizer.param_groups[0]["lr"] == 0.0
    with pytest.raises(ValueError, match="0 <= warmup_steps < total_steps, got 3 and 3"):
        warmup_cosine(optimizer, total_steps=3, warmup_steps=3)


def test_a_list_of_batches_is_loader_enough():
    trainer = regression()
    trainer.fit()
    assert trainer.step == 60
    torch.testing.assert_close(trainer.model.weight.detach(), torch.ones(1, 2), atol=1e-2, rtol=0)


def test_a_run_on_plain_batches_resumes_between_epochs_only():
    source, target = regression(), regression()
    source.epochs = 2
    source.fit()
    target.load_state_dict(source.state_dict())
    assert target.epoch == 2
    source._run_step(source.loader[0])
    from deepzero.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"after step 5, inside an epoch .* Use a loader with state_dict"):
        target.load_state_dict(source.state_dict())


def test_masked_weights_do_not_move(tmp_path):
    trainer = resumable.make(tmp_path)
    trainer.masks.sample = lambda step: {"5.bias": torch.tensor([True, False, False])}
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.epochs = 1
    trainer.fit()
    moved = {name: p.detach() != before[name] for name, p in trainer.model.named_parameters()}
    assert moved.pop("5.bias").tolist() == [True, False, False]
    assert not any(bool(m.any()) for m in moved.values())
    assert trainer.estimator.queries == 4 * 2


def test_evaluation_runs_in_eval_mode_and_training_goes_on_in_train_mode():
    modes = []

    class Watch(Callback):
        def on_step(self, trainer, record):
            modes.append(trainer.model.training)

    def evaluate(model):
        modes.append((model.training, torch.is_grad_enabled()))
        return {}

    trainer = regression(evaluate=evaluate, callbacks=[Watch()])
    trainer.epochs = 2
    trainer.fit()
    assert modes == [True, True, (False, False)] * 2


def test_best_is_the_epoch_of_the_highest_value(tmp_path):
    values = iter([0.1, 0.7, 0.7, 0.3])
    trainer = resumable.make(tmp_path)
    trainer.evaluate = lambda model: {"test_accuracy": next(values)}
    trainer.fit()
    assert (trainer.best, trainer.best_epoch) == (0.7, 2)
    assert checkpoint.load(tmp_path / "checkpoints" / "best.pt")["counters"]["epoch"] == 2


def test_a_spent_budget_ends_with_a_checkpoint_that_goes_on(tmp_path):
    per_step = 1 + round(0.2 * sum(p.numel() for p in resumable.make(tmp_path).model.parameters()))
    trainer = resumable.make(tmp_path, budget=5 * per_step + 3)
    with pytest.raises(BudgetError, match="3 are left"):
        trainer.fit()
    assert trainer.step == 5
    resumed = resumable.make(tmp_path)
    resumed.load_state_dict(checkpoint.load(tmp_path / "checkpoints" / "last.pt"))
    assert resumed.step == 5
    resumed.fit()
    straight = resumable.make(tmp_path / "straight")
    straight.fit()
    assert torch.equal(resumed.model[0].weight, straight.model[0].weight)


def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_survives(tmp_path):
    trainer = resumable.make(tmp_path)
    good = trainer.estimator.objective
    trainer.estimator.objective = lambda m, b: good(m, b) * (float("nan") if trainer.step == 5 else 1)
    with pytest.raises(ObjectiveError, match="the loss is nan before any perturbation"):
        trainer.fit()
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["counters"]["step"] == 4


def test_an_estimator_that_reports_no_finite_loss_is_stopped():
    class Broken(Backprop):
        def backward(self, batch, mask=None):
            return StepResult(float("inf"), 1)

    trainer = regression()
    trainer.estimator = Broken(trainer.model, objective)
    before = trainer.model.weight.detach().clone()
    with pytest.raises(ObjectiveError, match=r"the loss at step 0 is inf\. Lower the learning rate or mu"):
        trainer.fit()
    assert torch.equal(trainer.model.weight, before)


def test_weights_that_are_not_finite_never_reach_a_checkpoint(tmp_path):
    trainer = regression(callbacks=[Checkpoints(tmp_path)])

    class Poison(Callback):
        def on_step(self, trainer, record):
            if trainer.step == 6:
                with torch.no_grad():
                    trainer.model.bias.fill_(float("nan"))

    trainer.callbacks = (Poison(), *trainer.callbacks)
    with pytest.raises(
        ObjectiveError, match=r"bias is not finite after step 6; the checkpoint in .* was left as it is"
    ):
        trainer.fit()
    assert checkpoint.load(tmp_path / "last.pt")["counters"]["step"] == 4


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere():
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        trainer = regression(callbacks=[Progress("zo", stream=stream, seconds=0.0)])
        trainer.epochs = 2
        trainer.fit()
    assert "4/4 [" in terminal.getvalue()
    assert "queries/s" in terminal.getvalue()
    assert "\r" not in pipe.getvalue()
    lines = pipe.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("zo: step 1 of 4, loss ")
    assert lines[0].endswith("s left")
    assert lines[2].startswith("zo: epoch 1 of 2, train_loss ")


def test_progress_of_a_part_leaves_epochs_to_the_whole():
    stream = io.StringIO()
    trainer = regression(callbacks=[Progress("zo", stream=stream, seconds=0.0, part=True)])
    trainer.epochs = 1
    trainer.fit()
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == ["zo: step 1 of 2", "zo: step 2 of 2"]


def test_cpu_seconds_are_the_work_not_the_waiting():
    class Wait(Callback):
        def on_epoch(self, trainer, record):
            records.append(record)

    def evaluate(model):
        time.sleep(0.2)
        return {}

    records = []
    trainer = regression(evaluate=evaluate, callbacks=[Wait()])
    trainer.epochs = 2
    trainer.fit()
    assert [r["cpu_seconds"] > 0 for r in records] == [True, True]
    assert trainer.seconds - trainer.cpu_seconds > 0.2
    assert trainer.state_dict()["counters"]["cpu_seconds"] == trainer.cpu_seconds == records[1]["cpu_seconds"]


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = regression(callbacks=[TensorBoard(tmp_path)])
    trainer.epochs = 2
    trainer.fit()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'deepzero\[train\]', or set tensorboard = false"):
        TensorBoard(tmp_path)
