"""Tuning of Triton launches: off by default, measured once, kept by device, never during a capture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dzkernels.triton import _config

CONFIGS = [{"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 256, "num_warps": 2}, {"BLOCK": 512, "num_warps": 4}]


class Launches:
    """Launches that take BLOCK / 256 milliseconds, on a GPU that is said to be there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.measured: list[int] = []
        self.ran: list[int] = []
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setenv("DZ_TUNE", "1")
        monkeypatch.setattr(_config, "_tuned", {})
        monkeypatch.setattr(_config, "_device", lambda: "one GPU, triton 1")
        monkeypatch.setattr(_config, "_milliseconds", self.milliseconds)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def milliseconds(self, run: object, config: _config.Config) -> float:
        self.measured.append(config["BLOCK"])
        return config["BLOCK"] / 256

    def __call__(self, shape: tuple[int, ...] = (3, 5)) -> int:
        _config.launch("norm", shape, CONFIGS, lambda config: self.ran.append(config["BLOCK"]))
        return self.ran[-1]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launches:
    return Launches(monkeypatch, tmp_path / "cache")


def test_off_by_default_and_without_a_gpu(launches: Launches, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_config, "_device", lambda: None)
    assert launches() == 1024
    monkeypatch.setattr(_config, "_device", lambda: "one GPU, triton 1")
    monkeypatch.delenv("DZ_TUNE")
    assert launches() == 1024
    assert not launches.measured
    assert not (tmp_path / "cache").exists()


def test_the_fastest_is_measured_once_per_shape_and_kept(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launches() == 256
    assert launches() == 256
    assert launches.measured == [1024, 256, 512]
    assert launches((3, 6)) == 256
    assert len(launches.measured) == 6
    monkeypatch.setattr(_config, "_tuned", {})  # another process
    assert launches() == 256
    assert len(launches.measured) == 6
    monkeypatch.setattr(_config, "_device", lambda: "one GPU, triton 2")
    assert launches() == 256
    assert len(launches.measured) == 9
    assert len(json.loads(_config._path().read_text())) == 3


def test_a_capture_measures_nothing(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launches() == 1024
    assert not launches.measured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert launches() == 256
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launches() == 256


@pytest.mark.parametrize("text", ["", "[1, 2", '{"one GPU, triton 1: norm 3 5": {"BLOCK": 9}}', "[]"])
def test_a_spoilt_cache_is_measured_again(launches: Launches, text: str) -> None:
    _config._path().parent.mkdir(parents=True)
    _config._path().write_text(text)
    assert launches() == 256
    assert json.loads(_config._path().read_text()) == {"one GPU, triton 1: norm 3 5": CONFIGS[1]}


def test_a_cache_that_cannot_be_written_does_no_harm(launches: Launches) -> None:
    _config._path().parent.parent.write_text("a file where the folder should be")
    assert launches() == 256
    assert launches() == 256
    assert len(launches.measured) == 3
