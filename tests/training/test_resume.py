"""A run that is stopped anywhere, by anything, and resumed is the run that was never stopped."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepzero.errors import CheckpointError
from deepzero.training import checkpoint
from deepzero.training.callbacks import read_metrics

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import resumable  # noqa: E402

TIMES = ("seconds", "cpu_seconds", "queries_per_second")
CLOCKS = ("seconds", "cpu_seconds", "estimate_seconds")


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(HERE / "resumable.py"), str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def metrics(folder):
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(folder / "metrics.jsonl")]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in CLOCKS)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    resumable.main(folder)
    return folder


# a checkpoint is written every 3 steps and every epoch of 4: step 10 has one behind it, step 4 is an epoch's first
@pytest.mark.parametrize(
    ("step", "kill"), [(10, "SIGKILL"), (4, "SIGKILL"), (6, "SIGINT"), (6, "SIGINT+"), (13, "SIGTERM")]
)
def test_resume_is_bit_for_bit(straight, tmp_path, step, kill):
    stopped = run(tmp_path, step, kill)
    reached = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["counters"]["step"]
    if kill == "SIGKILL":
        assert stopped.returncode == -signal.SIGKILL
        assert reached == {10: 9, 4: 4}[step]
    else:
        assert stopped.returncode in (-signal.SIGINT, 130)  # the script lets KeyboardInterrupt end it
        assert f"{kill.rstrip('+')}: stopping after this step" in stopped.stderr
        assert reached == (step if kill.endswith("+") else step + 1)  # abandoned, or finished
    resumable.main(tmp_path)
    for name in ("last.pt", "previous.pt", "best.pt"):
        ours, theirs = (checkpoint.load(place / "checkpoints" / name) for place in (tmp_path, straight))
        assert same(ours, theirs), name
    assert metrics(tmp_path) == metrics(straight)


def test_metrics_hold_every_step_and_epoch_once(straight):
    steps = [r["step"] for r in metrics(straight) if r["event"] == "step"]
    epochs = [(r["epoch"], r["step"]) for r in metrics(straight) if r["event"] == "epoch"]
    assert steps == list(range(1, 17))
    assert epochs == [(1.0, 4), (2.0, 8), (3.0, 12), (4.0, 16)]


def test_the_comparison_can_fail(straight):
    state = checkpoint.load(straight / "checkpoints" / "last.pt")
    other = checkpoint.load(straight / "checkpoints" / "last.pt")
    assert same(state, other)
    other["optimizer"]["state"][0]["momentum_buffer"][0, 0, 0, 0] += 1e-7
    assert not same(state, other)


def test_a_checkpoint_of_any_estimator_and_optimizer_goes_on(tmp_path):
    from deepzero import CGE, RGE

    def make(folder, optimizer, estimator):
        return resumable.make(folder, optimizer=optimizer, estimator=estimator)

    for kinds in (
        (torch.optim.Adam, CGE),
        (torch.optim.SGD, functools.partial(RGE, queries=3)),
    ):
        first = make(tmp_path / "a", *kinds)
        first.fit()
        second = make(tmp_path / "b", *kinds)
        second.epochs = 2
        second.fit()
        third = make(tmp_path / "b", *kinds)
        torch.manual_seed(99)  # what the process drew meanwhile must not matter
        third.load_state_dict(checkpoint.load(tmp_path / "b" / "checkpoints" / "last.pt"))
        third.fit()
        assert same(first.state_dict(), third.state_dict()), kinds
        assert metrics(tmp_path / "a") == metrics(tmp_path / "b"), kinds


class TestAnotherRun:
    @pytest.fixture
    def state(self, straight):
        return checkpoint.load(straight / "checkpoints" / "last.pt")

    @pytest.fixture
    def trainer(self, tmp_path):
        return resumable.make(tmp_path)

    def refused(self, trainer, state, text):
        before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
        with pytest.raises(CheckpointError, match=text):
            trainer.load_state_dict(state)
        assert same(before, dict(trainer.model.state_dict()))

    def test_model(self, trainer, state):
        state["model"]["0.weight"] = torch.zeros(4, 1, 3, 3)
        self.refused(
            trainer, state, r"another model: 0.weight has shape \(4, 1, 3, 3\) in the checkpoint and \(2, 1, 3, 3\)"
        )

    def test_missing_weights(self, trainer, state):
        del state["model"]["5.bias"]
        self.refused(trainer, state, r"another model: 5.bias has shape none in the checkpoint and \(3,\) in the model")

    def test_optimizer(self, trainer, state):
        state["optimizer"]["param_groups"][0]["params"] = [0]
        self.refused(trainer, state, r"the checkpoint's optimizer does not fit this SGD: loaded state dict")

    @pytest.mark.parametrize("part", ["scheduler", "masks"])
    def test_parts(self, trainer, state, part):
        state[part] = None
        self.refused(trainer, state, r"the trainer has a (scheduler|mask policy) and the checkpoint has none")

    def test_loader(self, trainer, state):
        state["loader"] = None
        self.refused(trainer, state, r"taken after step 16, inside an epoch or with another kind of loader")

    def test_data(self, trainer, state):
        state["loader"]["samples"] = 15
        self.refused(trainer, state, r"saved for 15 samples in batches of 4, this loader has 14")
