"""The ablation collapse: the committed sweep holds what it promises, and the command that redraws it runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mu_sweep", ROOT / "benchmarks" / "mu_sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_rows_hold(sweep):
    rows = sweep.read(ROOT / "benchmarks" / "results" / "mu_sweep.csv")
    assert {(r["method"], float(r["mu"])) for r in rows} == {
        (method, mu) for method in (sweep.PLAIN, sweep.OURS, sweep.OURS_HALF) for mu in sweep.MUS
    }
    assert sweep.missed(rows) == []
    half = [float(r["worst_tensor_same_step"]) for r in rows if r["method"] == sweep.OURS_HALF]
    assert max(half) <= 2e-2
    # what the plain loop does: at the paper's smallest steps its error is as large as the gradient itself
    plain = {float(r["mu"]): float(r["error_same_step"]) for r in rows if r["method"] == sweep.PLAIN}
    assert plain[5e-7] > 1
    assert plain[1e-8] > plain[1e-6] > plain[1e-4] > plain[5e-3]


def test_a_missed_bar_is_reported(sweep):
    rows = sweep.read(ROOT / "benchmarks" / "results" / "mu_sweep.csv")
    bad = [{**r, "worst_tensor_same_step": "2e-5"} if r["method"] == sweep.OURS else r for r in rows]
    assert len(sweep.missed(bad)) == len(sweep.MUS)
    nan = [{**r, "worst_tensor_gradient": "nan"} if r["method"] == sweep.OURS else r for r in rows]
    assert len(sweep.missed(nan)) == 1


def test_the_command_runs_and_redraws(sweep, tmp_path):
    paths = ["--results", str(tmp_path / "rows.csv"), "--figure", str(tmp_path / "figure.png")]
    assert sweep.main(["--images", "4", "--coordinates", "1", *paths]) == 0
    first = (tmp_path / "figure.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    (tmp_path / "figure.png").unlink()
    assert sweep.main(["--redraw", *paths]) == 0
    assert (tmp_path / "figure.png").stat().st_size > 10_000
