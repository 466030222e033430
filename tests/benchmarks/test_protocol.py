"""docs/protocol.md is its committed rows, and what it claims follows from them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from benchmarks import protocol
from benchmarks.protocol import FIRST, JOBS, OURS, PLAIN, ZEROTH
from deepzero.training import ablate
from deepzero.training.ablate import DONE, Row, Study, by_label, mean_and_spread, read_rows

SEEDS = [0, 1, 2]


def rows(name: str) -> list[Row]:
    return read_rows(protocol.rows_of(name))


@pytest.mark.parametrize("name", JOBS)
def test_the_rows_are_those_of_the_study(name: str) -> None:
    job = JOBS[name]
    groups = by_label(rows(name))
    assert list(groups) == list(job.study.cells)
    for group in groups.values():
        assert [row.seed for row in group] == SEEDS[: job.seeds]
    configs = ablate.resolve(job.study, None, job.settings)
    for label, group in groups.items():
        for row in group:
            if row.ended == DONE:
                assert row.epochs == configs[label].epochs
                assert row.queries > 0


@pytest.mark.parametrize("name", JOBS)
def test_the_page_shows_the_rows(name: str) -> None:
    assert protocol.section(name) in protocol.PAGE.read_text(encoding="utf-8"), "run python -m benchmarks.protocol"
    assert (protocol.FIGURES / f"protocol-{name}.png").exists()


@pytest.mark.parametrize("name", ["digits", "mnist", "resnet20"])
def test_zeroth_order_is_within_a_point_of_first_order_with_the_same_masks(name: str) -> None:
    behind = protocol.points_behind(rows(name))
    assert behind
    assert {policy: points for policy, points in behind.items() if not points <= 1} == {}


def test_accuracy_is_flat_in_mu_and_the_plain_loop_falls() -> None:
    found = rows("mu")
    ours, plain = ({mu: mean_and_spread(v) for mu, v in protocol.steps(found, m).items()} for m in (OURS, PLAIN))
    best = max(mean for mean, _ in ours.values())
    assert {mu: mean for mu, (mean, spread) in ours.items() if not best - mean <= spread} == {}
    assert max(ours) == 5e-3
    small = [mu for mu in sorted(ours, reverse=True) if mu <= 1e-6]
    assert len(small) == 3
    for mu in small[:-1]:
        assert ours[mu][0] - plain[mu][0] > ours[mu][1] + plain[mu][1], f"mu = {mu:g}"
    assert {row.ended for row in by_label(found)[f"{PLAIN}{small[-1]:.0e}".replace("e-0", "e-")]} == {"step vanishes"}


@pytest.mark.parametrize("name", ["q-cnn", "q-mlp"])
def test_both_estimates_spent_the_same_and_more_directions_help(name: str) -> None:
    groups = by_label(rows(name))
    counts = [label.removeprefix("RGE, q=") for label in groups if label.startswith("RGE")]
    means = []
    for q in counts:
        rge, *cge = (groups[f"{name}, q={q}"] for name in ("RGE", "CGE", "CGE at rate 0.1"))
        for other in cge:
            assert [row.queries for row in rge] == [row.queries for row in other]
        means.append(mean_and_spread(row.test_accuracy for row in rge)[0])
    assert means == sorted(means)


def row(label: str, seed: int, accuracy: float) -> Row:
    return Row(label, seed, DONE, 1, accuracy, 1.0, 1.0, 10, 1.0, 1.0)


def test_points_behind_is_the_difference_of_means() -> None:
    made = [
        row(f"a{ZEROTH}", 0, 0.5),
        row(f"a{ZEROTH}", 1, 0.7),
        row(f"a{FIRST}", 0, 0.65),
        row(f"a{FIRST}", 1, 0.75),
        row(f"alone{ZEROTH}", 0, 0.1),
    ]
    assert protocol.points_behind(made) == {"a": pytest.approx(10)}
    made[0] = row(f"a{ZEROTH}", 0, math.nan)
    assert protocol.points_behind(made) == {"a": pytest.approx(0)}


def test_a_job_is_trained_kept_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    settings = ("model.options={depth=1, width=2}", "epochs=1", "data.batch_size=2000")
    study = Study("t", {"a": ["estimator.name=backprop", "estimator.options={}"]})
    monkeypatch.setattr(protocol, "JOBS", {"tiny": protocol.Job(study, "digits, tiny", settings, seeds=2)})
    for name, path in (("RESULTS", tmp_path), ("FIGURES", tmp_path), ("WORK", tmp_path / "work")):
        monkeypatch.setattr(protocol, name, path)
    page = tmp_path / "page.md"
    monkeypatch.setattr(protocol, "PAGE", page)
    page.write_text(f"before\n\n{protocol.begin('tiny')}\nold\n{protocol.END}\n\nafter\n")
    assert protocol.main(["run", "tiny"]) == 0
    kept = read_rows(tmp_path / "protocol-tiny.csv")
    assert [(r.label, r.seed, r.ended, r.queries) for r in kept] == [("a", 0, DONE, 1), ("a", 1, DONE, 1)]
    text = page.read_text()
    assert text.startswith("before\n\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    assert ablate.table(kept) in text
    assert "Digits, tiny. Commit " in text
    assert (tmp_path / "protocol-tiny.png").exists()
    protocol.render()
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="the page lacks <!-- rows of tiny"):
        protocol.render()
    with pytest.raises(SystemExit):
        protocol.main(["run", "tinny"])


def test_the_comparison_of_pages_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows("mu")
    other = [dataclasses.replace(found[0], test_accuracy=0.123), *found[1:]]
    monkeypatch.setattr(ablate, "read_rows", lambda path: other)
    assert protocol.section("mu") not in protocol.PAGE.read_text(encoding="utf-8")
