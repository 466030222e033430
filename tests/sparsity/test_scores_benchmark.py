"""The comparison of scores: the committed rows hold what is promised, and the command's parts do what they say."""

from __future__ import annotations

import numpy as np
import pytest

import deepzero as dz
from benchmarks import scores as bench


@pytest.fixture(scope="module")
def rows():
    return bench.read(bench.ROOT / "benchmarks" / "results" / "scores.csv")


def test_the_committed_rows_hold(rows):
    assert {(row["score"], row["seed"]) for row in rows} == {
        (name, seed) for name in (bench.REFERENCE, *bench.COMPARED) for seed in range(5)
    }
    assert bench.missed(rows) == []
    page = (bench.ROOT / "docs" / "sparsity.md").read_text(encoding="utf-8")
    assert bench.table(rows) in page, "docs/sparsity.md: copy the table that benchmarks.scores --redraw prints"


def test_a_missed_bar_is_reported(rows):
    for value in (0.5, float("nan")):
        bad = [{**row, "spearman": value} if row["score"] == "zo_grasp_layerwise" else row for row in rows]
        assert len(bench.missed(bad)) == 1


def test_measured_rows_are_written_read_and_drawn(tmp_path):
    data = dz.data.digits()
    found = bench.measure(data, 2, 0, 8, build=lambda: dz.models.paper_cnn(2, width=3))
    assert [row["score"] for row in found] == [bench.REFERENCE, *bench.COMPARED]
    assert found[0]["spearman"] == pytest.approx(1)
    assert found[0]["mean_difference"] == 0
    bench.write(found, tmp_path / "rows.csv", "a test")
    again = bench.read(tmp_path / "rows.csv")
    assert [row["score"] for row in again] == [row["score"] for row in found]
    for old, new in zip(found, again, strict=True):
        assert [float(f"{v:.4g}") for k, v in old.items() if k != "score"] == [
            v for k, v in new.items() if k != "score"
        ]
    bench.draw(again, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_ranks_share_ties():
    assert bench.spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 20.0, 20.0, 30.0])) == pytest.approx(
        0.9486833
    )
    assert bench.spearman(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1)


def test_samples_are_even_in_classes_and_normalised():
    images, labels = bench.sample(dz.data.digits(), 3, seed=1)
    assert images.shape == (30, 3, 32, 32)
    assert labels.bincount().tolist() == [3] * 10
    assert float(images.mean()) == pytest.approx(0, abs=1e-4)
