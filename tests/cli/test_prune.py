"""``deepzero prune``: the table, the files it leaves, and mistakes."""

from __future__ import annotations

import sys

import pytest
import torch
from typer.testing import CliRunner

from deepzero import cli
from deepzero.report.plots import plot_ratios
from deepzero.sparsity import LayerRatios, data_free, layer_ratios

OWN = """
import torch
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Tanh(), torch.nn.Linear(10, 4))
def objective(model, batch):
    return model(batch).square().mean()
def batch():
    return torch.linspace(-1, 1, 60).reshape(5, 12)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The arguments that name a user's own model in the working directory."""
    (tmp_path / "pruned_model.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "pruned_model", raising=False)
    return [
        *("--model", "pruned_model:model", "--batch", "pruned_model:batch", "--objective", "pruned_model:objective"),
        *("--set", "threads=1"),
    ]


def prune(*arguments):
    return CliRunner().invoke(cli.app, ["prune", *map(str, arguments)])


def test_prune_prints_saves_and_draws_every_score(own, tmp_path):
    scores = ["--score", "zo-grasp-layerwise", "--score", "data-free"]
    found = prune(*own, *scores, "--sparsity", 0.8, "--queries", 9, "--out", tmp_path / "out")
    assert found.exit_code == 0, found.output
    import pruned_model

    model = pruned_model.model()
    lines = {line.split()[0]: line.split() for line in found.output.splitlines() if line}
    measured = LayerRatios.load(tmp_path / "out" / "zo-grasp-layerwise.json", model)
    formula = LayerRatios.load(tmp_path / "out" / "data-free.json", model)
    assert formula == layer_ratios(data_free(model), 0.8)
    for name in ("0.weight", "2.weight"):
        cells = [f"{measured.pruned[name]:.4f}", str(measured.kept[name])]
        assert lines[name][2:] == [*cells, f"{formula.pruned[name]:.4f}", str(formula.kept[name])]
    assert measured.kept["0.weight"] + measured.kept["2.weight"] == round(0.2 * 160)
    assert measured.kept["0.bias"] == 10
    assert lines["all"][1:] == ["174", "0.7356", "46", "0.7356", "46"]
    # 9 directions on 3 layers at two points, and two base losses
    assert "loss values spent: zo-grasp-layerwise 20, data-free 0" in found.output
    assert (tmp_path / "out" / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_the_configuration_counts(own, tmp_path):
    options = ["--set", 'sparsity.always_on=["2.*"]', "--set", "sparsity.score_options.keep='lowest'"]
    found = prune(*own, "--score", "magnitude", *options, "--set", "sparsity.fraction=0.5", "--out", tmp_path)
    assert found.exit_code == 0, found.output
    import pruned_model

    kept = LayerRatios.load(tmp_path / "magnitude.json", pruned_model.model()).kept
    assert kept == {"0.weight": 60, "0.bias": 10, "2.weight": 40, "2.bias": 4}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--score", "zo-grap"], "sparsity.ratios = 'zo-grap' is unknown. Did you mean 'zo-grasp'?"),
        (["--sparsity", "1.0"], "sparsity.fraction"),
        (["--sparsity", "-0.1"], "sparsity.fraction"),
        (["--queries", "0"], "--queries"),
        (["--queries", "2"], "queries must be at least one direction for each of the model's 3 layers, got 2"),
        (["--set", "sparsity.score_options.qeries=3"], "sparsity.score_options.qeries is not an option of"),
        (["--score", "magnitude", "--sparsity", "0.999"], "prunes all 120 coordinates of '0.weight'"),
    ],
)
def test_mistakes_are_exit_code_2_and_leave_no_folder(own, tmp_path, arguments, text):
    found = prune(*own, *arguments, "--out", tmp_path / "out")
    assert found.exit_code == 2, found.output
    assert text in " ".join(found.output.split())
    assert "Traceback" not in found.output
    assert not (tmp_path / "out").exists()


def test_the_picture_shows_what_is_pruned(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 4))
    ratios = {"one": layer_ratios(data_free(model), 0.5), "two": layer_ratios(data_free(model, seed=1), 0.5)}
    assert plot_ratios(ratios, tmp_path / "ratios.png").stat().st_size > 5_000
