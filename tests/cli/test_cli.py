"""The command line as a user meets it: real processes, exit codes, one clear message."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from deepzero import cli
from deepzero.errors import ConfigError
from deepzero.report.plots import plot_run
from deepzero.training import checkpoint

pytest.importorskip("sklearn")

SMALL = [
    "model.options.depth=1",
    "model.options.width=4",
    "data.batch_size=128",
    "epochs=2",
    "tensorboard=false",
    "estimator.name=plain-loop",
    "threads=1",
]


def options(*overrides):
    return [part for override in (*SMALL, *overrides) for part in ("--set", override)]


def invoke(*arguments):
    """The command in this process."""
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def start(*arguments, cwd=None):
    return subprocess.Popen(
        [sys.executable, "-m", "deepzero", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    found = invoke("train", "--folder", folder, *options())
    assert found.exit_code == 0, found.output
    return folder, found.output


def test_train_prints_both_methods_and_fills_the_run_folder(finished):
    folder, output = finished
    assert "test accuracy" in output
    lines = {
        line.split()[0]: line.split()
        for line in output.splitlines()
        if line.startswith(("plain-loop ", "first-order "))
    }
    assert set(lines) == {"plain-loop", "first-order"}
    for label, place in (("plain-loop", folder), ("first-order", folder / "first-order")):
        last = records(place)[-1]
        assert lines[label][1] == f"{last['test_accuracy']:.2%}"
        assert lines[label][3] == f"{last['queries']:,}"
        assert {p.name for p in (place / "checkpoints").iterdir()} == {"last.pt", "previous.pt", "best.pt"}
    assert records(folder)[-1]["queries"] == 2 * 12 * (1 + round(0.1 * 98))
    assert records(folder / "first-order")[-1]["queries"] == 2 * 12
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "run.png") in output.replace("\n", "")


def test_both_methods_start_from_the_same_weights_and_batch(finished):
    folder, _ = finished
    first, compared = records(folder)[0], records(folder / "first-order")[0]
    assert first["loss"] == pytest.approx(compared["loss"], rel=1e-6)
    assert first["lr"] == compared["lr"]


def test_the_stored_configuration_repeats_the_run(finished, tmp_path):
    folder, _ = finished
    again = invoke("train", folder / "config.toml", "--folder", tmp_path / "again", "--set", "first_order=false")
    assert again.exit_code == 0, again.output
    times = ("seconds", "cpu_seconds", "queries_per_second")
    same = [[{k: v for k, v in r.items() if k not in times} for r in records(p)] for p in (folder, tmp_path / "again")]
    assert same[0] == same[1]


def test_resuming_a_finished_run_reports_it_again(finished):
    folder, output = finished
    found = invoke("resume", folder)
    assert found.exit_code == 0, found.output
    assert found.output.splitlines()[-3:-1] == output.splitlines()[-3:-1]


def test_resume_trains_the_comparison_that_was_never_begun(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "first-order")
    found = invoke("resume", tmp_path / "run")
    assert found.exit_code == 0, found.output
    losses = [
        [r["loss"] for r in records(p / "first-order") if r["event"] == "step"] for p in (folder, tmp_path / "run")
    ]
    assert losses[0] == losses[1]


def test_an_interrupt_before_the_first_checkpoint_promises_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("deepzero.training.launch.prepare", interrupt)
    found = invoke("train", "--folder", tmp_path / "run")
    assert found.exit_code == 130
    assert found.output.strip() == "deepzero: interrupted."


def test_sigterm_ends_with_a_checkpoint_and_130_and_resume_finishes(tmp_path):
    run = tmp_path / "run"
    process = start("train", "--folder", run, *options("epochs=400", "first_order=false"))
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or len(records_so_far(run)) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"interrupted. Go on with: deepzero resume {run}" in errors
    assert "Traceback" not in errors
    state = checkpoint.load(run / "checkpoints" / "last.pt")
    assert state["counters"]["step"] == len([r for r in records(run) if r["event"] == "step"]) < 4800
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("epochs = 400", "epochs = 1"))
    assert invoke("resume", run).exit_code == 0


def records_so_far(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_a_spent_budget_is_exit_code_3_and_goes_on_with_a_larger_one(tmp_path):
    found = invoke("train", "--folder", tmp_path / "run", *options("estimator.budget=100", "first_order=false"))
    assert found.exit_code == 3
    assert "of the budget of 100 are spent" in found.output
    assert f"deepzero resume {tmp_path / 'run'}" in found.output.replace("\n", "")
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("budget = 100", "budget = 100000"))
    assert invoke("resume", tmp_path / "run").exit_code == 0


def test_a_diverging_run_is_exit_code_4_and_keeps_its_checkpoint(tmp_path):
    run = tmp_path / "run"
    diverging = ["estimator.name=backprop", "estimator.options={}", "optimizer.options.lr=1e38", "first_order=false"]
    found = invoke("train", "--folder", run, *options(*diverging))
    assert found.exit_code == 4
    assert "the loss is inf before any perturbation" in found.output
    assert checkpoint.load(run / "checkpoints" / "last.pt")["counters"]["step"] == 0


MISTAKES = {
    "unknown key": (["--set", "epoch=3"], r"epoch is not a key. Did you mean 'epochs'?"),
    "unknown model": (
        options("model.name=resnt20"),
        "model.name = 'resnt20' is unknown. Did you mean 'resnet20'? Known: paper-cnn",
    ),
    "unknown model option": (
        options("model.options.dept=1"),
        "model.options.dept is not an option of paper-cnn. Did you mean 'depth'? Options: depth, width.",
    ),
    "shape is the data's": (
        options("model.options.in_channels=1"),
        "model.options.in_channels is not an option of paper-cnn",
    ),
    "unknown estimator": (
        options("estimator.name=cgee"),
        "estimator.name = 'cgee' is unknown. Did you mean 'cge'? Known: cge, rge, layerwise, hybrid, stale, "
        "forward-gradient, plain-loop, backprop.",
    ),
    "unknown estimator option": (
        options("estimator.options.m=1"),
        "estimator.options.m is not an option of plain-loop. Did you mean 'mu'? Options: mu, scheme.",
    ),
    "unknown optimizer": (options("optimizer.name=SDG"), "optimizer.name = 'SDG' is unknown. Did you mean 'SGD'?"),
    "unknown optimizer option": (
        options("optimizer.options.momntum=1"),
        "optimizer.options.momntum is not an option of SGD. Did you mean 'momentum'?",
    ),
    "optimizer of another kind": (options("optimizer.name=LBFGS"), "optimizer.name = 'LBFGS' is unknown"),
    "unusable optimizer value": (
        options("optimizer.options.momentum=-1"),
        "optimizer.options do not suit SGD: Invalid momentum value: -1",
    ),
    "unusable estimator value": (options("estimator.options.mu=-1"), "mu must be a positive finite"),
    "unusable model value": (
        options("model.name=vit", "model.options={patch=3}"),
        "model.options do not suit vit: vit: image_size must be a multiple of patch",
    ),
    "warm-up too long": (
        options("schedule.warmup_epochs=2"),
        "schedule.warmup_epochs = 2.0 takes 24 steps, the run only has 24",
    ),
    "unknown data": (options("data.name=digit"), "data.name = 'digit' is unknown. Did you mean 'digits'?"),
    "no data folder": (options("data.name=cifar10"), "cifar10 is read from a local folder and none was given"),
    "no device": (options("device=warp"), "device = 'warp' cannot be used: "),
}


@pytest.mark.parametrize(("arguments", "text"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_exit_code_2_and_leave_no_folder(arguments, text, tmp_path):
    found = invoke("train", "--folder", tmp_path / "run", *arguments)
    assert found.exit_code == 2, found.output
    assert text in found.output
    assert "Traceback" not in found.output
    assert not (tmp_path / "run").exists()


def test_usage_errors_are_exit_code_2():
    assert invoke("trian").exit_code == 2
    assert invoke("train", "--nope").exit_code == 2


def test_a_folder_with_a_run_is_not_overwritten(finished):
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_bytes()
    found = invoke("train", "--folder", folder, *options())
    assert found.exit_code == 2
    assert "already holds a run. Resume it (deepzero resume" in found.output
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_resume_needs_a_run_with_a_good_checkpoint(finished, tmp_path):
    assert "holds no run: there is no config.toml in it" in invoke("resume", tmp_path).output
    folder, _ = finished
    (tmp_path / "config.toml").write_text((folder / "config.toml").read_text())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"junk")
    (tmp_path / "checkpoints" / "previous.pt").write_bytes((folder / "checkpoints" / "last.pt").read_bytes())
    found = invoke("resume", tmp_path)
    assert found.exit_code == 2
    assert "previous.pt (step 24) is good: to go on from it, copy it over last.pt" in found.output.replace("\n", "")
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == b"junk"


def test_plan_of_the_configured_model():
    found = invoke("plan", *options("estimator.name=cge"))
    assert found.exit_code == 0, found.output
    assert "0.weight" in found.output


def test_plan_step_by_step(own):
    found = invoke("plan", *own, "--steps")
    assert found.exit_code == 0, found.output
    head, *rest = found.output.splitlines()
    assert head == "weight"
    assert rest[0].split() == ["fused", "kernel", "or", "rule", "travels", "as", "bytes", "alive"]
    assert rest[2].split() == ["rule", "aten.linear.default", "OneChannel", "16", "16"]  # 4 samples of one feature
    assert "queries an estimate in" in found.output
    assert "aten.linear.default" not in invoke("plan", *own).output


OWN = """
import torch
def model():
    return torch.nn.Linear(3, 2)
def objective(model, batch):
    return model(batch).square().mean()
def batch():
    return torch.ones(4, 3)
value = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The arguments that name a user's own model in the working directory."""
    (tmp_path / "own_model.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return ["--model", "own_model:model", "--batch", "own_model:batch", "--objective", "own_model:objective"]


def test_plan_of_a_users_own_model(own):
    found = invoke("plan", *own)
    assert found.exit_code == 0, found.output
    assert "weight" in found.output
    for wrong, text in (
        ("own_model", "--model own_model: expected package.module:name"),
        ("own_model:absent", "--model own_model:absent: module 'own_model' has no attribute 'absent'"),
        (
            "own_modle:model",
            "--model own_modle:model: No module named 'own_modle'. Run deepzero where own_modle can be",
        ),
        ("own_model:value", "--model own_model:value: expected something to call, got int"),
    ):
        found = invoke("plan", "--model", wrong, *own[2:])
        assert found.exit_code == 2
        assert text in found.output
    assert "give --model and --batch together" in invoke("plan", *own[:2]).output
    assert (
        "estimator.options do not suit cge" in invoke("plan", *own, "--set", "estimator.options.precision=half").output
    )


def test_check_of_a_users_own_model(own, monkeypatch):
    found = invoke("check", *own, "--set", "estimator.options.mu=1e-3")
    assert found.exit_code == 0, found.output
    assert "quotients at mu = 0.001 in float32" in found.output
    bounds = importlib.import_module("deepzero.report.check").BOUNDS
    monkeypatch.setitem(bounds, "float32", -1.0)
    found = invoke("check", *own)
    assert found.exit_code == 1
    assert "WRONG" in found.output


def test_info_names_versions_and_the_native_build():
    found = invoke("info")
    assert found.exit_code == 0, found.output
    for name in ("deepzero", "torch", "numpy", "dzkernels"):
        assert any(line.startswith(name) for line in found.output.splitlines()), name


def test_train_without_an_argument_is_the_main_job(tmp_path):
    """Its first steps; the whole of it takes minutes."""
    process = start("train", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob("runs/*/metrics.jsonl"))) or len(found[0].read_text().splitlines()) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "SIGINT: stopping after this step" in errors
    run = found[0].parent
    assert 'name = "cge"' in (run / "config.toml").read_text()
    assert (run / "tensorboard").is_dir()
    assert 0 < checkpoint.load(run / "checkpoints" / "last.pt")["counters"]["step"] < 100


def test_a_picture_needs_matplotlib_and_a_finished_epoch(finished, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no finished epoch to draw"):
        plot_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"matplotlib is not installed: pip install 'deepzero\[train\]'"):
        plot_run(finished[0])
