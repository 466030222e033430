"""The GPU benchmark, rehearsed on the CPU: processes that fail, rows, loops that keep their memory, the prediction."""

from __future__ import annotations

import csv
import math
import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks import convolutions, floors, gpu, peers, report
from benchmarks.cases import build, sample

OURS, REUSE = ("ours", "float32", "default"), ("block reuse", "float32", "tuned")
TOPS = {"float32_flops": 1e12, "bfloat16_flops": 1e13, "memory_bytes": 1e11}


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _rehearse(device: str, out: Path, *more: str) -> list[dict[str, str]]:
    gpu.main(["--device", device, "--quick", "--seconds", "0.01", "--rounds", "2", "--out", str(out), *more])
    return _read(out)


def test_a_rehearsal_writes_rows_that_agree_with_float64(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = gpu.ask
    same = (TOPS, {"device": "a card"})  # the ceilings of the CPU take seconds
    monkeypatch.setattr(gpu, "ask", lambda f, *args, **more: same if f is gpu.ceilings else ask(f, *args, **more))
    monkeypatch.setattr(gpu, "counts", lambda name: (floors.Floor(1e6, 1e4), 110))
    rows = _rehearse("cpu", tmp_path / "rows.csv", "--only", "ours float32,reuse", "--setting", "tuned")
    assert [(r["contender"], r["verdict"]) for r in rows] == [("block reuse", "ok"), ("ours", "ok")]
    for line in rows:
        each, p20, p80 = (float(line[name]) for name in ("us_per_query", "p20_us", "p80_us"))
        assert p20 <= each <= p80
        assert float(line["queries_per_s"]) * each == pytest.approx(1e6, rel=2e-3)  # four digits are written
        assert float(line["step_s"]) == pytest.approx(each * 1e-6 * (int(line["mask_queries"]) + 1), rel=2e-3)
        assert (line["of_floor"] != "") == (line["contender"] == "ours")
    ours = rows[1]
    assert float(ours["error"]) < 1e-5
    assert (ours["mask_queries"], ours["torch"], ours["peak_bfloat16_tflops"]) == ("110", torch.__version__, "10")
    each = float(ours["us_per_query"]) * 1e-6
    assert float(ours["of_float32_peak"]) == pytest.approx(1e6 / each / 1e12, rel=2e-3)
    assert float(ours["of_bandwidth"]) == pytest.approx(2 * 4 * 1e4 / each / 1e11, rel=2e-3)
    assert capsys.readouterr().out.count("| quick | ours |") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_rehearsal_on_a_gpu(tmp_path: Path) -> None:
    rows = _rehearse("cuda", tmp_path / "rows.csv")
    assert [r["verdict"] for r in rows] == ["ok"] * len(gpu.CONTENDERS), rows


# --- processes


def test_a_process_that_fails_says_why() -> None:
    assert gpu.ask(math.sqrt, 4.0, limit=60) == 2
    with pytest.raises(gpu.Failed, match="ValueError"):
        gpu.ask(math.sqrt, -1.0, limit=60)
    with pytest.raises(gpu.Failed, match="died with code 3"):
        gpu.ask(os._exit, 3, limit=60)
    watched: list[int] = []
    with pytest.raises(gpu.Failed, match="longer than 1 s"):
        gpu.ask(time.sleep, 600, limit=1, watch=lambda: watched.append(1))
    assert watched


def test_later_rows_survive_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(function: object, *arguments: object, **_: object) -> object:
        if function is gpu.ceilings:
            return TOPS, {"device": "a card"}
        if function is gpu.reference:
            return {}
        if arguments[1] == OURS:
            raise gpu.Failed("the process died with code -11")
        return {"error": 0.1, "cosine": 0.5, "times": [2.0], "first": 1.0, "queries": 7, "how": "x", "peak": 2**30}

    monkeypatch.setattr(gpu, "ask", ask)
    monkeypatch.setattr(gpu, "counts", lambda name: (floors.Floor(1e6, 1e4), 110))
    rows = {(r["contender"], r["dtype"], r["setting"]): r for r in _rehearse("cpu", tmp_path / "rows.csv")}
    assert rows.keys() == gpu.CONTENDERS.keys()
    assert rows[OURS]["verdict"] == "failed: the process died with code -11"
    assert rows[OURS]["device"] == "a card" and rows[OURS]["queries_per_s"] == ""
    assert rows[REUSE]["verdict"] == "wrong"
    assert (rows[REUSE]["queries_per_s"], rows[REUSE]["peak_gib"]) == ("0.5", "1")


def test_no_contender_is_started_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ask", lambda f, *_, **__: (TOPS, {"device": "a card"}) if f is gpu.ceilings else {})
    gpu.main(["--device", "cpu", "--quick", "--budget", "0", "--out", str(tmp_path / "rows.csv")])
    assert not (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--work", "W9"], "no work called W9: there are W5, W5b, W1, W4"),
        (["--setting", "fast"], "no setting called fast: there are default, tuned"),
        (["--only", "torchzero"], "no contender left: there are block reuse, ours, plain loop, vmap"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        gpu.main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match=r"nothing can be measured on cuda: .*--device cpu rehearses"):
        gpu.main([])


# --- loops that are replayed


@pytest.mark.parametrize("kind", [gpu.ReplayedLoop, gpu.ReplayedReuse])
def test_a_replayed_loop_reads_the_memory_it_was_captured_with(
    kind: type[gpu.ReplayedLoop] | type[gpu.ReplayedReuse], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a CUDA graph does: what it was captured with, at other values."""
    captured: list[torch.Tensor] = []

    def replayed(function: object, device: torch.device) -> object:
        if kind is gpu.ReplayedReuse:
            captured.extend(contender.inputs)
        return function

    monkeypatch.setattr(gpu, "replayed", replayed)
    monkeypatch.setattr(peers, "MU", 5e-2)
    case = build(gpu.QUICK["quick"])
    groups = sample(case, 24)
    contender = kind(case, groups)
    contender.quotients()
    with torch.no_grad():
        for p in case.model.parameters():
            p.mul_(0.5)
    got = contender.quotients()
    if kind is gpu.ReplayedReuse:
        assert {t.data_ptr() for t in contender.inputs} == {t.data_ptr() for t in captured}
    error, cosine = peers.agreement(got, peers.Loop(case.double(), groups).quotients())
    assert error < 1e-3, (error, cosine)
    assert len(contender.graphs) == (1 if kind is gpu.ReplayedLoop else len({contender.start[g.name] for g in groups}))


# --- what is seen and written


def test_clocks_are_ranges_of_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = gpu.Clocks()
    assert clocks.columns() == dict.fromkeys(("sm_mhz", "memory_mhz", "power_w", "celsius"), "")
    for text in ("1980, 2619, 350.12, 41", "", "[N/A], 2619, 1.0, 40", "345, 2619, 90.5, 43"):
        monkeypatch.setattr(gpu, "_nvidia_smi", lambda *_, text=text: text)
        clocks()
    assert clocks.columns() == {
        "sm_mhz": "345 to 1980",
        "memory_mhz": "2619 to 2619",
        "power_w": "90.5 to 350.12",
        "celsius": "41 to 43",
    }


def test_rows_stand_beside_the_fastest_loop_of_their_device() -> None:
    def line(contender: str, device: str, rate: str) -> dict[str, str]:
        return {"work": "W5", "contender": contender, "device": device, "queries_per_s": rate}

    rows = [line("ours", "a", "90"), line("plain loop", "a", "10"), line("block reuse", "a", "30")]
    rows += [line("ours", "b", "90"), line("ours", "a", "")]
    assert [r["times_loop"] for r in gpu.beside_loops(rows)] == ["3x", "0.3333x", "1x", "", ""]


def test_the_prediction_is_counts_over_the_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    one = floors.Floor(989e12 / 128 * 2e-6, 3.35e12 / 4 / 128 * 5e-6)  # 2 us of arithmetic, 5 of traffic
    monkeypatch.setattr(gpu, "counted", lambda name: (one, 999))
    monkeypatch.setattr(gpu, "moved", lambda name: (3.35e12 / 128 * 8e-6, 3.35e12 / 128 * 16e-6))
    found = {name: float(gpu.prediction("W5")[name]) for name in ("arithmetic_us", "traffic_us", "floor_us")}
    assert found == {"arithmetic_us": 2, "traffic_us": 5, "floor_us": 5}
    larger = gpu.prediction("W5b")
    assert (larger["floor_us"], larger["floor_queries_per_s"], larger["floor_step_s"]) == ("10", "1e+05", "0.01")
    assert (larger["half_queries_per_s"], larger["half_step_s"]) == ("5e+04", "0.02")
    assert (larger["plan_mb_per_query"], larger["apart_mb_per_query"]) == ("53.6", "107.2")
    assert larger["plan_queries_per_s"] == "6.25e+04"
    monkeypatch.setattr(gpu, "moved", lambda name: None)
    assert "plan_mb_per_query" not in gpu.prediction("W5")


def test_the_committed_page_is_the_committed_rows() -> None:
    page = gpu.PAGE.read_text(encoding="utf-8")
    predicted, measured = gpu.committed()
    assert report.insert(page, gpu.page_rows(predicted, measured)) == page, "run python -m benchmarks.gpu --report"
    assert {line["work"] for line in predicted} == gpu.WORKS.keys()
    for line in predicted:
        floor, count = gpu.counts(line["work"])
        assert count == build(gpu.WORKS[line["work"]], batch=1).count
        seconds = max(floor.flops / 989e12, 4 * floor.values / 3.35e12)
        assert float(line["half_step_s"]) == pytest.approx(2 * seconds * (count + 1), rel=1e-3)


# --- convolutions one by one


@pytest.fixture
def _unprepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of this process are those of the other tests too."""
    monkeypatch.setattr(gpu, "prepare", lambda setting: None)


@pytest.mark.usefixtures("_unprepared")
def test_convolutions_are_raced_on_the_same_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rehearsal, in a table that keeps a row for each way."""
    out = tmp_path / "rows.csv"
    quick = ["--device", "cpu", "--quick", "--out", str(out)]
    table = convolutions.main(quick)
    ways = [(work, way) for work in ("convolution", "norm and convolution") for way in ("cpu", "reference")]
    ways.append(("norm and convolution", "cpu, fused"))
    for dtype in convolutions.DTYPES:
        assert sorted((r["work"], r["way"]) for r in table if r["dtype"] == dtype) == sorted(ways)
    assert all(r["verdict"] == "ok" and float(r["us"]) > 0 for r in table), table
    assert len(_read(out)) == len(table) == 10
    assert capsys.readouterr().out.count("x PyTorch's") == 4
    convolutions.main([*quick, "--dtype", "float32"])
    assert len(_read(out)) == 10


@pytest.mark.usefixtures("_unprepared")
def test_a_wrong_convolution_does_not_win(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    convolve = convolutions.Work.convolution

    def wrong(self: convolutions.Work, backend: str, moved: torch.Tensor | None = None) -> torch.Tensor:
        out = convolve(self, backend, moved)
        return out * (1 + 2.0**-5) if backend == "cpu" else out

    def fail(self: convolutions.Work, backend: str) -> torch.Tensor:
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(convolutions.Work, "convolution", wrong)
    monkeypatch.setattr(convolutions.Work, "fused", fail)
    table = convolutions.main(["--device", "cpu", "--quick", "--dtype", "bfloat16"])
    verdicts = {(r["work"], r["way"]): r["verdict"] for r in table}
    assert [verdicts[work, "cpu"] for work in ("convolution", "norm and convolution")] == ["wrong", "wrong"]
    assert verdicts["norm and convolution", "cpu, fused"] == "failed: no room"
    assert capsys.readouterr().out.count("reference ") == 4  # two rows, and both won


def test_what_convolutions_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no dtype called int8: there are bfloat16, float32"):
        convolutions.main(["--device", "cpu", "--dtype", "int8"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"torch sees no CUDA device\. --device cpu --quick rehearses"):
        convolutions.main([])
