"""Studies: the cells they are made of, resuming after any end, and rows that say what happened."""

from __future__ import annotations

import dataclasses
import math
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from deepzero import cli
from deepzero.errors import DataError
from deepzero.report.plots import plot_ablation
from deepzero.training import ablate, checkpoint
from deepzero.training.ablate import Row, Study, curves, mean_and_spread, read_rows, sweep, table, write_rows
from deepzero.training.build import build_trainer, prepare
from deepzero.training.callbacks import read_metrics
from deepzero.training.config import load_config
from deepzero.training.studies import STUDIES, equal_queries

pytest.importorskip("sklearn")

SMALL = [
    "model.options={depth=1, width=4}",
    "data.batch_size=512",
    "epochs=2",
    "estimator.name=backprop",
    "estimator.options={}",
]


def options(*overrides):
    return [part for override in (*SMALL, *overrides) for part in ("--set", override)]


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["ablate", *map(str, arguments)])


def timeless(folder):
    return [dataclasses.replace(row, seconds=0, cpu_seconds=0) for row in read_rows(folder / "results.csv")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate") / "sweep"
    found = invoke("--sweep", "sparsity.fraction=0.5,0.9", "--seeds", 2, "--folder", folder, *options())
    assert found.exit_code == 0, found.output
    return folder, found.output


def test_a_sweep_is_one_run_for_every_value_and_seed(finished):
    folder, output = finished
    rows = read_rows(folder / "results.csv")
    assert [(row.label, row.seed) for row in rows] == [
        (f"sparsity.fraction={fraction}", seed) for fraction in (0.5, 0.9) for seed in (0, 1)
    ]
    for row in rows:
        (place,) = folder.glob(f"*{row.label}/seed-{row.seed}")
        config = load_config(place / "config.toml")
        assert f"sparsity.fraction={config.sparsity.fraction}" == row.label
        assert (config.seed, config.epochs, config.model.options["width"]) == (row.seed, 2, 4)
        last = read_metrics(place / "metrics.jsonl")[-1]
        for name in ("test_accuracy", "test_loss", "train_loss", "queries", "seconds", "cpu_seconds"):
            assert getattr(row, name) == pytest.approx(last[name], rel=1e-5), name
        assert (row.ended, row.epochs, row.queries) == ("done", 2, 2 * 3)
        assert row.cpu_seconds > 0
    assert len({row.train_loss for row in rows}) == 4, "values and seeds make a difference"
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert table(rows) in (folder / "table.md").read_text()
    assert table(rows) in output


def test_cells_of_one_seed_start_from_the_same_weights(finished):
    folder, _ = finished
    losses = [read_metrics(path)[0]["loss"] for path in sorted(folder.glob("*/seed-0/metrics.jsonl"))]
    other = [read_metrics(path)[0]["loss"] for path in sorted(folder.glob("*/seed-1/metrics.jsonl"))]
    assert losses[0] == losses[1] != other[0] == other[1]


def test_finished_cells_are_not_run_again_and_seeds_can_be_added(finished):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/metrics.jsonl")}
    found = invoke("--sweep", "sparsity.fraction=0.5,0.9", "--seeds", 3, "--folder", folder, *options())
    assert found.exit_code == 0, found.output
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/metrics.jsonl")}
    assert len(after) == 6
    assert {path: after[path] for path in before} == before


def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path):
    """A real process, killed inside its second cell."""
    arguments = ["--sweep", "optimizer.options.lr=0.1,0.05", "--seeds", 1]
    slower = options("epochs=5", "data.batch_size=64", "checkpoint_every=10")
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    process = subprocess.Popen(
        [sys.executable, "-m", "deepzero", "ablate", *map(str, arguments), "--folder", str(killed), *slower],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = killed / "01-optimizer.options.lr=0.05" / "seed-0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 15:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    reached = checkpoint.load(metrics.parent / "checkpoints" / "last.pt")["counters"]["step"]
    assert 10 <= reached < 5 * 23
    assert [row.label for row in read_rows(killed / "results.csv")] == ["optimizer.options.lr=0.1"]
    first = killed / "00-optimizer.options.lr=0.1" / "seed-0" / "metrics.jsonl"
    stamp = first.stat().st_mtime_ns
    for folder in (killed, straight):
        found = invoke(*arguments, "--folder", folder, *slower)
        assert found.exit_code == 0, found.output
    assert first.stat().st_mtime_ns == stamp
    assert timeless(killed) == timeless(straight)
    steps = [r["step"] for r in read_metrics(metrics) if r["event"] == "step"]
    assert steps == list(range(1, 5 * 23 + 1))


def test_a_cell_killed_before_its_first_checkpoint_starts_over(finished, tmp_path):
    folder, _ = finished
    study = sweep(["sparsity.fraction=0.5"])
    configs = ablate.resolve(study, None, SMALL)
    ablate.run("sweep", study, configs, tmp_path / "s", seeds=1)
    (place,) = (tmp_path / "s").glob("*/seed-0")
    for path in (place / "checkpoints").iterdir():
        path.unlink()
    (row,) = ablate.run("sweep", study, configs, tmp_path / "s", seeds=1)
    assert dataclasses.replace(row, seconds=0, cpu_seconds=0).train_loss == pytest.approx(
        timeless(folder)[0].train_loss, rel=1e-5
    )


def test_ctrl_c_is_exit_code_130_and_the_same_command_goes_on(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ablate, "start", interrupt)
        found = invoke("--sweep", "sparsity.fraction=0.5", "--seeds", 1, "--folder", tmp_path / "s", *options())
    assert found.exit_code == 130
    assert "interrupted. The same command goes on from here." in found.output
    found = invoke("--sweep", "sparsity.fraction=0.5", "--seeds", 1, "--folder", tmp_path / "s", *options())
    assert found.exit_code == 0, found.output


def test_an_end_that_is_a_finding_has_its_row_and_the_others_go_on(tmp_path):
    study = Study(
        "ends",
        {
            "lr=1e38": ["optimizer.options.lr=1e38"],
            "budget": ["estimator.budget=4"],
            "vanishing": ["estimator.name=plain-loop", "estimator.options={mu=1e-12}"],
            "lr=0.1": ["optimizer.options.lr=0.1"],
        },
        SMALL,
    )
    rows = ablate.run("ends", study, ablate.resolve(study), tmp_path / "s", seeds=1)
    assert [row.ended for row in rows] == ["not finite", "budget spent", "step vanishes", "done"]
    assert [row.epochs for row in rows] == [0, 1, 0, 2]
    assert [math.isnan(row.test_accuracy) for row in rows] == [True, False, True, False]
    assert "| lr=1e38 | - | - | - | 0 | 0 | 0 | 1; 1 not finite |" in table(rows)
    again = ablate.run("ends", study, ablate.resolve(study), tmp_path / "s", seeds=1)
    assert [row.ended for row in again] == [row.ended for row in rows]
    assert plot_ablation(rows, tmp_path / "plot.png", title="ends").exists()


MISTAKES = {
    "nothing": ([], "give one study (mu, q, sparsity"),
    "both": (["mu", "--sweep", "sparsity.fraction=0.5"], "or --sweep key=value,value,..."),
    "unknown study": (["sparsty"], "study 'sparsty' is unknown. Did you mean 'sparsity'? Known: mu, q,"),
    "unknown key": (
        ["--sweep", "sparsity.fractoin=0.5"],
        "sparsity.fractoin is not a key. Did you mean 'sparsity.fraction'?",
    ),
    "unusable value of a later cell": (
        ["--sweep", "sparsity.fraction=0.5,1.5"],
        "sparsity.fraction = 1.5: input should be less than 1",
    ),
    "no values": (["--sweep", "sparsity.fraction="], "--sweep sparsity.fraction=: expected section.key=value,value"),
    "an empty value": (["--sweep", "sparsity.fraction=0.5,,0.9"], "expected section.key=value,value,..."),
    "no equals sign": (["--sweep", "sparsity.fraction"], "--sweep sparsity.fraction: expected section.key=value"),
    "a value twice": (["--sweep", "epochs=1,2,1"], "--sweep epochs=1,2,1: a value is given twice"),
    "a key twice": (
        ["--sweep", "epochs=1,2", "--sweep", "epochs=2,3"],
        "--sweep epochs=2,3: epochs is swept already",
    ),
    "no seeds": (["--sweep", "epochs=1,2", "--seeds", 0], "seeds = 0: a study takes at least one"),
    "unknown metric": (["mu", "--metric", "accuracy"], "metric = 'accuracy' is unknown. Known: test_accuracy,"),
    "a swept key set": (
        ["mu", "--set", "estimator.options.mu=1e-3"],
        "--set estimator.options.mu=1e-3: every cell of this study sets estimator.options.mu itself",
    ),
    "the seed set": (["mu", "--set", "seed=3"], "--set seed=3: every cell of this study sets seed itself"),
    "a cell that cannot be built": (
        ["--sweep", "model.options.depth=1,9", "--set", "model.options.width=[]"],
        "model.options.depth=1: model.options do not suit paper-cnn",
    ),
    "a later cell of another estimator": (
        ["--sweep", "estimator.name=cge,cgee"],
        "estimator.name=cgee: estimator.name = 'cgee' is unknown. Did you mean 'cge'?",
    ),
    "no data folder": (
        ["mu", "--set", "data.name=cifar10"],
        "mu=5e-3: cifar10 is read from a local folder and none was given",
    ),
}


@pytest.mark.parametrize(("arguments", "text"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_exit_code_2_before_any_work(arguments, text, tmp_path):
    found = invoke(*arguments, "--folder", tmp_path / "s")
    assert found.exit_code == 2, found.output
    assert text in found.output
    assert "Traceback" not in found.output
    assert not (tmp_path / "s").exists()


def test_an_error_keeps_its_kind(tmp_path):
    study = Study("m", {"all": ["data.name=cifar10"]})
    with pytest.raises(DataError, match=r"^all: cifar10 is read from a local folder"):
        ablate.run("m", study, ablate.resolve(study, None, SMALL), tmp_path / "s", seeds=1)


def test_the_folder_of_something_else_is_left_alone(finished, tmp_path):
    folder, _ = finished
    before = (folder / "results.csv").read_bytes()
    for arguments in (["--sweep", "sparsity.fraction=0.5,0.8"], ["--sweep", "sparsity.fraction=0.5"], ["mu"]):
        found = invoke(*arguments, "--folder", folder)
        assert found.exit_code == 2
        assert "holds another study, or this one with other settings" in found.output.replace("\n", "")
    assert (folder / "results.csv").read_bytes() == before
    (tmp_path / "letter.txt").write_text("mine")
    assert "is not empty and holds no study. Choose a new folder." in invoke("mu", "--folder", tmp_path).output
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_study_wins_over_a_file_and_yields_to_set(tmp_path):
    (tmp_path / "c.toml").write_text("epochs = 3\n[data]\nbatch_size = 7\n[sparsity]\nfraction = 0.1\n")
    study = Study("s", {"a": ["sparsity.fraction=0.2"]}, settings=("epochs=4", "checkpoint_every=2"))
    config = ablate.resolve(study, tmp_path / "c.toml", ["checkpoint_every=9"])["a"]
    assert (config.epochs, config.data.batch_size, config.sparsity.fraction) == (4, 7, 0.2)
    assert (config.checkpoint_every, config.first_order, config.tensorboard) == (9, False, False)


def test_an_override_reaches_the_cells_that_do_not_set_it():
    study = Study("s", {"dense": ["sparsity.fraction=0"], "sparse": [], "mu=1": ["estimator.options.mu=1"]})
    configs = ablate.resolve(study, None, ["sparsity.fraction=0.8", 'estimator.options={scheme="central"}'])
    assert [config.sparsity.fraction for config in configs.values()] == [0, 0.8, 0.8]
    assert configs["mu=1"].estimator.options == {"scheme": "central", "mu": 1}


def test_values_in_brackets_are_one_value():
    study = sweep(["model.options={hidden=[3, 4]},{hidden=[5]}", "data.flip=true,false"])
    assert list(study.cells.values()) == [
        (f"model.options={{hidden={hidden}}}", f"data.flip={flip}")
        for hidden in ("[3, 4]", "[5]")
        for flip in ("true", "false")
    ]
    assert list(study.cells) == [", ".join(cell) for cell in study.cells.values()]


@pytest.mark.parametrize("name", STUDIES)
def test_every_cell_of_a_study_can_be_built(name, tmp_path):
    configs = ablate.resolve(STUDIES[name])
    images = prepare(load_config())
    for config in configs.values():
        assert config.data.name == "digits"
        build_trainer(config, images, tmp_path)
    assert not list(tmp_path.iterdir())


def test_equal_queries_are_equal(tmp_path):
    study = equal_queries(98, (3, 98), settings=("model.options={depth=1, width=4}", "epochs=1"))
    rows = ablate.run("q", study, ablate.resolve(study, None, ["data.batch_size=1024"]), tmp_path / "s", seeds=1)
    assert {row.label: row.queries for row in rows} == {
        "RGE, q=3": 2 * 4,
        "RGE, q=98": 2 * 99,
        "CGE, q=3": 2 * 4,
        "CGE, q=98": 2 * 99,
        "CGE at rate 0.1, q=3": 2 * 4,
        "CGE at rate 0.1, q=98": 2 * 99,
    }


def row(label, seed=0, accuracy=0.5, ended="done", **values):
    return Row(label, seed, ended, 1, accuracy, 1.0, 2.0, 1000, 3.0, 4.0)


def test_mean_and_spread():
    assert mean_and_spread([1.0, 2.0, 4.0, math.nan]) == (pytest.approx(7 / 3), pytest.approx(math.sqrt(7 / 3)))
    assert mean_and_spread([3.0])[0] == 3.0
    assert all(map(math.isnan, [mean_and_spread([3.0])[1], *mean_and_spread([math.nan]), *mean_and_spread([])]))


def test_the_table_gives_mean_deviation_and_early_ends():
    rows = [row("a", 0, 0.5), row("a", 1, 0.7), row("b"), row("c", 0, math.nan, "not finite"), row("c", 1, 0.25)]
    assert table(rows).splitlines()[2:] == [
        "| a | 60.00 ± 14.14 | 1.000 ± 0.000 | 2.000 ± 0.000 | 1,000 | 3 | 4 | 2 |",
        "| b | 50.00 | 1.000 | 2.000 | 1,000 | 3 | 4 | 1 |",
        "| c | 25.00 | 1.000 ± 0.000 | 2.000 ± 0.000 | 1,000 | 3 | 4 | 2; 1 not finite |",
    ]


def test_rows_are_read_back_as_written(tmp_path):
    rows = [row("a, mu=1e-3", 0, 0.125), row('b "quoted", x', 1)]
    write_rows(rows, tmp_path / "r.csv")
    assert read_rows(tmp_path / "r.csv") == rows
    write_rows([row("a", accuracy=math.nan)], tmp_path / "r.csv")
    assert math.isnan(read_rows(tmp_path / "r.csv")[0].test_accuracy)


def test_labels_that_end_in_a_number_are_curves():
    assert curves(["mu=5e-3", "mu=1e-6"]) == ("mu", {"": {"mu=5e-3": 5e-3, "mu=1e-6": 1e-6}})
    assert curves(["RGE, q=1", "RGE, q=20", "CGE, d=3, q=1"]) == (
        "q",
        {"RGE": {"RGE, q=1": 1.0, "RGE, q=20": 20.0}, "CGE, d=3": {"CGE, d=3, q=1": 1.0}},
    )
    for labels in (["a=1", "b=2"], ["a=1", "dense"], ["one, a=1", "other, a=1"], ["a=x", "a=y"], []):
        assert curves(labels) is None, labels


def test_the_picture_shows_means_and_deviations(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    real = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda axes, *a, **k: (drawn.append((a, k)), real(axes, *a, **k))[1])
    rows = [row("A, mu=1", 0, 0.5), row("A, mu=1", 1, 0.7), row("A, mu=100", 0, 0.8), row("B, mu=1", 0, 0.1)]
    plot_ablation(rows, tmp_path / "curves.png", title="t")
    (x, means), style = drawn[0]
    assert (x, means[0], style["label"]) == ((1.0, 100.0), pytest.approx(0.6), "A")
    assert style["yerr"][0] == pytest.approx(math.sqrt(0.02))
    drawn.clear()
    plot_ablation([*rows[:2], row("dense")], tmp_path / "lines.png", title="t", metric="test_loss")
    (means, label), style = drawn[0]
    assert (means, label, style["xerr"]) == ([1.0], ["A, mu=1"], [0.0])
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "lines.png"}


def test_a_missing_matplotlib_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = invoke("mu", "--folder", tmp_path / "s")
    assert found.exit_code == 2
    assert "matplotlib is not installed: pip install 'deepzero[train]'" in found.output
    assert not (tmp_path / "s").exists()


def test_a_terminal_gets_a_bar(capsys):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with ablate._Bar("mu", 2, stream) as bar:
        bar.done("a, seed 0", row("a"))
    assert "1/2 [" in stream.getvalue()
    assert "a, seed 0: done, test accuracy 50.00%, 1,000 queries" in stream.getvalue()
