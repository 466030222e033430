"""Checkpoint files: whole or absent, and refused with a reason when they are not ours."""

from __future__ import annotations

import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch

from deepzero.errors import CheckpointError
from deepzero.training import checkpoint


def state(step):
    return {"counters": {"step": step}, "model": {"w": torch.arange(1000.0) + step}}


@pytest.fixture
def last(tmp_path):
    """last.pt of step 2 with previous.pt of step 1."""
    path = tmp_path / "last.pt"
    checkpoint.save(state(1), path)
    checkpoint.save(state(2), path)
    return path


def test_last_and_previous(last):
    assert sorted(p.name for p in last.parent.iterdir()) == ["last.pt", "previous.pt"]
    assert torch.equal(checkpoint.load(last)["model"]["w"], state(2)["model"]["w"])
    assert checkpoint.load(last.with_name("previous.pt"))["counters"]["step"] == 1


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_save_leaves_the_last_good_one(last, monkeypatch, failing):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(state(3), last)
    monkeypatch.undo()
    assert checkpoint.load(last)["counters"]["step"] == 2
    assert not list(last.parent.glob("*.tmp"))


def test_a_state_that_cannot_be_saved_leaves_the_last_good_one(last):
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError), match=r"pickle|local"):
        checkpoint.save({"counters": lambda: 0}, last)
    assert checkpoint.load(last)["counters"]["step"] == 2


class Evil:
    def __reduce__(self):
        return (os.abort, ())


def flip(path):
    content = bytearray(path.read_bytes())
    at = content.find(torch.arange(2.0, 6.0).numpy().tobytes())
    assert at > 0
    content[at + 1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": (
        lambda p: p.write_bytes(p.read_bytes()[:-100]),
        r"last.pt: expected a checkpoint of .* whole bytes, but it is truncated",
    ),
    "half": (
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        r"it is truncated, corrupted or another kind of file",
    ),
    "empty": (lambda p: p.write_bytes(b""), r"expected a checkpoint of 0 whole bytes"),
    "one bit": (flip, r"the checkpoint is corrupted: the checksum of .* does not match"),
    "text": (lambda p: p.write_text("hello"), r"another kind of file"),
    "missing": (lambda p: p.unlink(), r"last.pt: there is no readable checkpoint here \(No such file"),
    "foreign": (
        lambda p: torch.save({"weights": torch.zeros(1)}, p),
        r"was not written by deepzero: it has no format_version",
    ),
    "foreign tensor": (lambda p: torch.save(torch.zeros(1), p), r"was not written by deepzero"),
    "code": (
        lambda p: torch.save({"format_version": 1, "x": Evil()}, p),
        r"holds more than tensors and plain types.*it was not read",
    ),
    "newer": (
        lambda p: torch.save({"format_version": 99}, p),
        r"has format_version 99, this deepzero reads up to 1. Install",
    ),
    "other zip": (
        lambda p: shutil.make_archive(str(p.with_suffix("")), "zip", p.parent) and p.with_suffix(".zip").rename(p),
        r"expected a checkpoint, reading it failed",
    ),
}


@pytest.mark.parametrize(("damage", "text"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_not_a_good_checkpoint_is_refused_and_the_good_one_is_named(last, damage, text):
    damage(last)
    good = str(last.with_name("previous.pt"))
    with pytest.raises(CheckpointError, match=text) as refused:
        checkpoint.load(last)
    assert f"The checkpoint {good} (step 1) is good: to go on from it, copy it over last.pt" in str(refused.value)
    last.with_name("previous.pt").unlink()
    with pytest.raises(CheckpointError, match=text) as refused:
        checkpoint.load(last)
    assert "is good" not in str(refused.value)


def test_random_state_round_trip(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second draw in store
    checkpoint.save({"rng": checkpoint.random_state()}, tmp_path / "a.pt")

    def draws():
        return [
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),
            np.random.rand(),
            torch.rand(1).item(),
        ]

    first = draws()
    draws()
    checkpoint.set_random_state(checkpoint.load(tmp_path / "a.pt")["rng"])
    assert draws() == first
