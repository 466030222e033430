"""The works are what they say, every contender computes the same thing, and rows become a page and a picture."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import floors, machine, peers, report, throughput
from benchmarks.cases import WORKS, Work, build, every, layers, mask_of, objective, sample
from deepzero.models import paper_cnn

SMALL = {
    "cnn": Work("tiny CNN", lambda: paper_cnn(2, width=3), (3, 8, 8), 6, layers, 202, chunk=8, sample=24),
    "sparse": Work(
        "tiny CNN, sparse", lambda: paper_cnn(2, width=3), (3, 8, 8), 6, layers, 202, sparsity=0.5, chunk=8, sample=24
    ),
}


# --- the works


@pytest.mark.parametrize("name", WORKS)
def test_a_work_has_the_stated_sizes(name: str) -> None:
    work = WORKS[name]
    case = build(work)
    assert sum(p.numel() for p in case.model.parameters()) == work.parameters
    assert case.batch[0].shape == (work.batch, *work.image)
    assert case.model.training
    kept = case.count / work.parameters
    assert kept == pytest.approx(1 - (work.sparsity or (0.8964 if work.ratios else 0)), abs=1e-3)


@pytest.mark.parametrize("name", WORKS)
def test_the_sample_is_proportional_and_misses_no_parameter(name: str) -> None:
    work = WORKS[name]
    case = build(work, batch=2)
    groups = sample(case, work.sample)
    assert [g.name for g in groups] == [n for n, p in case.model.named_parameters() if case.mask[n].any()]
    assert sum(g.share for g in groups) == pytest.approx(1)
    for group in groups:
        assert case.mask[group.name][tuple(group.where.unbind(1))].all()
        assert len(group.where) <= max(1, round(work.sample * group.share))
    assert sum(int(m.sum()) for m in mask_of(case, groups).values()) == sum(len(g.where) for g in groups)


@pytest.mark.parametrize("k", [1, 3, 64])
def test_every_kth_coordinate(k: int) -> None:
    case = build(SMALL["sparse"])
    thinner = every(case, k)
    assert thinner.keys() == {name for name, m in case.mask.items() if m.any()}
    assert all(bool((case.mask[name] | ~m).all()) for name, m in thinner.items())
    count = sum(int(m.sum()) for m in thinner.values())
    assert case.count / k - 1 <= count <= case.count / k + len(thinner) + 1
    if k == 1:
        assert count == case.count


@pytest.mark.parametrize("name", WORKS)
def test_the_stages_are_the_model(name: str) -> None:
    case = build(WORKS[name], batch=2)
    x = case.batch[0]
    stages = WORKS[name].stages(case.model)
    with torch.no_grad():
        for stage in stages:
            x = stage.run(x)
        assert torch.equal(x, case.model(case.batch[0]))
    for parameter, _ in case.model.named_parameters():
        assert sum(parameter.startswith(stage.owns) for stage in stages) == 1


# --- the contenders


def _needs(kind: type[peers.Contender]) -> None:
    if kind is peers.TorchZero:
        pytest.importorskip("torchzero")


@pytest.mark.parametrize(("work", "layout"), [("cnn", "default"), ("cnn", "tuned"), ("sparse", "default")])
@pytest.mark.parametrize("key", peers.CONTENDERS, ids="-".join)
def test_a_contender_agrees_with_float64(
    key: tuple[str, str, str], layout: str, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = peers.CONTENDERS[key]
    _needs(kind)
    monkeypatch.setattr(peers, "MU", 5e-2)  # far from the rounding of float32, whose quotients are those of the peers
    case = build(SMALL[work])
    groups = sample(case, SMALL[work].sample)
    if layout == "tuned":
        kind, case = peers.TUNED.get(kind, kind), case.channels_last() if kind.layout else case
    reference = peers.Loop if key[0] == "CGE" else peers.RandomLoop
    wanted = reference(case.double(), groups).quotients()
    contender = kind(case, groups)
    contender.first()
    contender.settle(0.01)
    error, cosine = peers.agreement(contender.quotients(), wanted)
    if kind.context:
        exact = peers.Backprop(case.double(), groups).quotients()
        error, cosine = peers.agreement(contender.quotients(), exact)
    assert error < (2e-2 if "bfloat16" in key else 1e-5 if key[1] == "ours" else 1e-3), (error, cosine)
    assert contender.round() > 0
    assert contender.queries > 0 and contender.how


def test_peers_leave_the_weights_as_they_were() -> None:
    case = build(SMALL["cnn"])
    before = [p.detach().clone() for p in case.model.parameters()]
    groups = sample(case, 24)
    for kind in (peers.Loop, peers.Reuse, peers.RandomLoop, peers.Vmap):
        kind(case, groups).quotients()
        assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True)), kind


def test_agreement_sees_a_wrong_contender() -> None:
    wanted = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    assert peers.agreement({"a": torch.tensor([1.0, 2.0])}, wanted) == (0, pytest.approx(1))
    error, cosine = peers.agreement({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([-3.0])}, wanted)
    assert error > 1 and cosine < peers.LIMIT
    assert peers.agreement({"b": torch.zeros(1)}, wanted)[1] < peers.LIMIT


def test_the_floor_of_a_network_is_counted_by_hand() -> None:
    """One hidden unit's difference needs no product; a conv before a conv needs one channel through the second."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.Flatten())

    work = Work("two convolutions", make, (1, 4, 4), 2, layers, 40 + 185)
    floor = floors.count(work)
    first = 2 * 9 * 1 * 5 * 16 * 2  # one input channel, five output channels, sixteen pixels, two images
    assert floor.flops == pytest.approx(first * 40 / 225, rel=0.01)


def test_what_a_plan_moves_is_counted_by_hand() -> None:
    """The plans differ where the second norm's input is dense: for 48 of 389 coordinates the activation of 4 channels,
    16 pixels and two images, in bfloat16, is neither written nor read."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 5, 3, padding=1), nn.Flatten(),
        )  # fmt: skip

    work = Work("three convolutions", make, (1, 4, 4), 2, layers, 389)
    apart, fused = (floors.planned(work, fused=both) for both in (False, True))
    assert fused > 0
    assert apart - fused == pytest.approx(2 * 2 * 4 * 16 * 2 * 48 / 389)


# --- rows


def _race(monkeypatch: pytest.MonkeyPatch, only: list[str]) -> list[dict[str, str]]:
    tops = {"float32_flops": 1e11, "bfloat16_flops": 2e11, "cache_bytes": 1e11, "memory_bytes": 1e10}
    monkeypatch.setattr(machine, "ceilings", lambda: tops)
    options = argparse.Namespace(threads=1, seconds=0.01, rounds=2, only=only, estimator="CGE,RGE", gate="skipped")
    return throughput.race("W3", options)


def test_a_race_gives_rows_that_replace_older_ones_and_render(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = _race(monkeypatch, ["ours", "plain loop"])
    assert len(rows) == 2 * 6
    assert {row["verdict"] for row in rows} == {"ok"}
    path = tmp_path / "throughput-x.csv"
    throughput.record(path, rows)
    throughput.record(path, [row | {"commit": "later"} for row in rows[:3]])
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    assert sum(row["commit"] == "later" for row in table) == 3
    text = report.markdown(table)
    assert "W3: MLP 784-32-10" in text
    assert text.count("| ours |") == 8
    figure = tmp_path / "figure.png"
    report.draw(table, figure)
    assert figure.stat().st_size > 5_000


def test_the_page_keeps_what_is_around_the_rows() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.insert(page, "new\n")
    assert new == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.insert(new, "new\n") == new
    with pytest.raises(ValueError, match="the page lacks"):
        report.insert("nothing", "new")


def test_the_committed_page_is_drawn_from_the_committed_rows() -> None:
    rows = [row for path in report.tables() for row in report.read(path)]
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.insert(page, report.markdown(rows)) == page, "run python -m benchmarks.report"


def test_no_rows_from_a_red_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "gate", lambda: False)
    options = argparse.Namespace(threads=1, no_gate=False)
    with pytest.raises(SystemExit, match="no rows are written"):
        throughput.gated(options)


def test_double_is_the_same_case() -> None:
    small = build(SMALL["cnn"])
    twice = small.double()
    assert next(twice.model.parameters()).dtype is torch.float64
    with torch.no_grad():
        losses = [float(objective(case.model, case.batch)) for case in (small, twice)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
