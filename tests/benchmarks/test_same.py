"""Two files of results, bit by bit: what differs is seen, named and measured; what is the same passes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import same
from benchmarks.same import Times, blocks, compare, compare_row, interval, report, ulps

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def row(dtype: torch.dtype = torch.float32, **changes: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = {
        "loss": torch.tensor(2.25, dtype=torch.float64),
        "queries": torch.tensor(7),
        "grad of w": torch.randn(3, 4, generator=generator).to(dtype),
        "grad of b": torch.tensor([0.5, -1.5, 0.0], dtype=dtype),
    }
    return parts | changes


def flipped(tensor: Tensor, at: int, bit: int) -> Tensor:
    """One bit of one number, the other way round."""
    out = tensor.clone().view(-1)
    integers = out.view(same.INTEGERS[tensor.element_size()])
    integers[at] ^= 1 << bit
    return out.view(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_are_identical(dtype: torch.dtype) -> None:
    found = compare_row("r", row(dtype), row(dtype))
    assert found.identical and found.changed == 0 and found.values == 17


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_flipped_bit_is_one_ulp(dtype: torch.dtype) -> None:
    changed = row(dtype)
    changed["grad of w"] = flipped(changed["grad of w"], 5, 0)
    found = compare_row("r", row(dtype), changed)
    assert not found.identical
    assert (found.changed, found.ulps, found.where) == (1, 1, "grad of w")
    assert 0 < found.relative <= torch.finfo(dtype).eps


def test_a_sign_of_zero_counts_as_a_difference_of_no_size() -> None:
    found = compare_row("r", row(), row(**{"grad of b": torch.tensor([0.5, -1.5, -0.0])}))
    assert not found.identical
    assert (found.changed, found.ulps, found.relative) == (1, 0, 0)


def test_values_that_are_views_are_compared_in_their_order() -> None:
    wide = torch.arange(24, dtype=torch.float32).view(4, 6)
    assert compare_row("r", {"g": wide[:, ::2]}, {"g": wide[:, ::2].clone()}).identical
    assert compare_row("r", {"g": wide.t()}, {"g": wide.t().contiguous()}).identical


@pytest.mark.parametrize("swap", [False, True])
def test_nan_beside_a_number_is_infinitely_far(swap: bool) -> None:
    pair = [row(), row(**{"grad of b": torch.tensor([0.5, float("nan"), 0.0])})]
    found = compare_row("r", *(pair[::-1] if swap else pair))
    assert not found.identical
    assert (found.ulps, found.relative, found.where) == (math.inf, math.inf, "grad of b")


def test_ulps_across_zero_and_of_extremes() -> None:
    tiny = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    old = torch.tensor([tiny, -tiny, 1.0, -1.0, 0.0])
    new = torch.tensor([-tiny, tiny, 1.0 + 2.0**-22, -1.0 + 2.0**-23, -0.0])
    assert ulps(old, new).tolist() == [2, 2, 2, 2, 0]
    top = torch.tensor([torch.finfo(torch.float64).max], dtype=torch.float64)
    assert ulps(top, -top).item() == pytest.approx(2 * 0x7FEFFFFFFFFFFFFF)


def test_rows_and_parts_that_are_missing_or_of_another_form() -> None:
    less = {name: part for name, part in row().items() if name != "grad of b"}
    for old, new, text in (
        (None, row(), "missing in the old file"),
        (row(), None, "missing in the new file"),
        (row(), less, "grad of b: missing in the new file"),
        (less, row(), "grad of b: missing in the old file"),
        (row(), row(torch.float64), r"grad of w: torch.float32 [3, 4] before, torch.float64 [3, 4] now"),
        (row(), row(**{"grad of b": torch.zeros(2)}), r"grad of b: torch.float32 [3] before, torch.float32 [2] now"),
        (row(), "ValueError: no", "raised 'no error' before, 'ValueError: no' now"),
    ):
        found = compare_row("r", old, new)
        assert not found.identical
        assert found.where == text
    assert compare_row("r", "ValueError: no", "ValueError: no").identical


def test_whole_numbers_differ_too() -> None:
    found = compare_row("r", row(), row(queries=torch.tensor(8)))
    assert (found.identical, found.changed, found.where) == (False, 1, "queries")


def test_the_report_counts_and_lists() -> None:
    old = {"W1: CGE": row(), "W1: CGE, block 3": row(), "rule relu: CGE": row()}
    wrong = row(**{"grad of w": flipped(row()["grad of w"], 0, 0)})
    text = report(compare(old, old | {"W1: CGE": wrong}))
    words = [line.split() for line in text.splitlines()]
    assert ["W1,", "default", "blocks", "1", "0", "1", "5.5e-08"] in words
    assert ["W1,", "stated", "blocks", "1", "1", "0", "0"] in words
    assert ["W1:", "CGE", "1", "of", "17", "1", "5.5e-08", "grad", "of", "w"] in words
    assert "Only rows of default blocks differ" in text
    assert "Only rows" not in report(compare(old, old | {"W1: CGE, block 3": wrong}))
    assert "numbers that differ" not in report(compare(old, dict(old)))


def test_rows_of_stated_blocks_are_compared_with_their_twins() -> None:
    wrong = row(**{"grad of w": flipped(row()["grad of w"], 0, 3)})
    found = blocks({"W1: CGE": row(), "W1: CGE, block 3": wrong, "W1: RGE": row()})
    assert [(f.name, f.ulps) for f in found] == [("W1: CGE, block 3", 8)]


@pytest.mark.parametrize("change", ["nothing", "bit", "row"])
def test_the_command_ends_with_1_unless_all_is_identical(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old: dict[str, Any] = {"facts": {"commit": "a"}, "rows": {"W1: CGE": row(), "W1: RGE": row()}}
    new: dict[str, Any] = {"facts": {"commit": "b"}, "rows": {"W1: CGE": row(), "W1: RGE": row()}}
    if change == "bit":
        new["rows"]["W1: RGE"]["grad of b"] = flipped(row()["grad of b"], 2, 30)
    elif change == "row":
        del new["rows"]["W1: CGE"]
    torch.save(old, tmp_path / "old.pt")
    torch.save(new, tmp_path / "new.pt")
    status = same.main(["compare", str(tmp_path / "old.pt"), str(tmp_path / "new.pt")])
    assert status == (change != "nothing")
    printed = capsys.readouterr().out
    assert "commit: a and b" in printed
    assert ("W1: RGE" in printed) == (change == "bit")


def test_two_saves_of_one_checkout_are_identical(tmp_path: Path) -> None:
    """In processes of their own; and another checkout's packages would be found by their path."""
    files = [tmp_path / "one.pt", tmp_path / "two.pt"]
    for file in files:
        assert same.main(["save", str(file), "--only", "rule conv2d-grouped"]) == 0
    rows = same.load(files[0])[1]
    assert rows and not any(isinstance(parts, str) for parts in rows.values())
    assert same.main(["compare", *map(str, files)]) == 0


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="its process ended with status 1"):
        same.main(["save", str(tmp_path / "x.pt"), "--tree", str(tmp_path)])


# --- speed

STAND_IN = """
import json, sys
request = json.loads(sys.argv[1])
seconds = {slow} if request["tree"].endswith("slow") else 1.0
print(json.dumps(seconds / 10), flush=True)
for line in sys.stdin:
    print(json.dumps(seconds), flush=True)
"""


@pytest.mark.parametrize("slow, said", [(1.0, "same"), (1.01, "same"), (1.05, "slower"), (0.9, "faster")])
def test_speed_tells_three_percent(slow: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stand-ins for a checkout's process, whose answers are known."""
    monkeypatch.setattr(same, "CHILD", STAND_IN.format(slow=slow))
    here, there = tmp_path / "slow", tmp_path / "other"
    for tree in (here, there):
        tree.mkdir()
    times = same.speed(there, here, ["W1: CGE", "W3: RGE"], starts=2, rounds=3, threads=1)
    assert list(times) == ["import", "W1: CGE, the first", "W1: CGE", "W3: RGE, the first", "W3: RGE"]
    for name, found in times.items():
        once = name == "import" or name.endswith("first")
        row = found.row(name)
        assert len(found.pairs) == (2 if once else 6)
        assert row[4] == f"{slow:.3f}"
        assert row[-1] == ("unclear" if once else said)


def test_a_checkout_beside_itself_runs_in_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the noise of the machine: each process says its own number."""
    child = "import os, sys\nprint(os.getpid(), flush=True)\nfor line in sys.stdin: print(os.getpid(), flush=True)"
    monkeypatch.setattr(same, "CHILD", child)
    times = same.speed(tmp_path, tmp_path, ["W1: CGE"], starts=1, rounds=2, threads=1)
    assert all(len(t.pairs) and all(a != b for a, b in t.pairs) for t in times.values())


@pytest.mark.parametrize(
    "low, high, said",
    [
        (0.98, 1.02, "same"),
        (1.028, 1.059, "unclear"),  # narrow, but around the line
        (0.95, 1.01, "unclear"),
        (0.8, 1.2, "unclear"),
        (1.031, 1.2, "slower"),
        (0.9, 0.969, "faster"),
        (float("nan"), float("nan"), "unclear"),
    ],
)
def test_same_means_that_the_whole_interval_is_within_three_percent(low: float, high: float, said: str) -> None:
    assert same.verdict(low, high)[1] == said


def test_five_rounds_say_nothing_and_six_say_their_range() -> None:
    assert interval([1.0] * 5) == (0, math.inf)
    assert interval([1.0, 1.2, 0.9, 1.1, 0.8, 1.3]) == (0.8, 1.3)
    assert interval([float(k) for k in range(1, 21)]) == (6, 15)  # the sign test's table at n = 20
    assert Times([(1.0, 1.0)] * 5).row("r")[-2:] == ("too few rounds", "unclear")


def test_the_parent_needs_nothing_of_the_tests() -> None:
    assert "benchmarks.estimates" not in sys.modules
    assert json.loads(json.dumps(list(same.TIMED))) == list(same.TIMED)
