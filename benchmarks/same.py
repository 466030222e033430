"""Show that a change of the code changed no result and no speed: this checkout beside another one.

    python -m benchmarks.same save FILE [--tree OTHER]     every estimator's results, here or in another checkout
    python -m benchmarks.same compare OLD NEW              bit by bit; status 1 unless they are identical
    python -m benchmarks.same blocks FILE                  rows of default blocks beside blocks of a stated size
    python -m benchmarks.same speed OTHER                  CPU time here against CPU time there, in turn

A checkout must be built (``python setup.py build_ext --inplace``). The works and the rules' table are those of the
checkout that this is run in, so that two checkouts are asked the same; results come from the other's packages.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import machine

FIXED = ", block "
"""In the name of a row whose blocks have a stated size; the row named by what stands before it has default ones."""

TIMED = ("CGE float32", "CGE bfloat16", "RGE gaussian float32")
"""Rows of a work whose estimates are timed."""

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
LIMIT = 40
"""Rows that a table lists at most, the farthest off first."""

CHILD = """
import json, sys, time
request = json.loads(sys.argv[1])
import torch
began = time.process_time()
import deepzero, dzkernels
imported = time.process_time() - began
for package in (deepzero, dzkernels):
    assert package.__file__.startswith(request["tree"] + "/"), f"{package.__file__} is not of {request['tree']}"
sys.path[:0] = [request["root"], request["root"] + "/tests"]
from benchmarks import estimates
estimates.main(request, imported)
"""
"""The packages are imported first, from the checkout; what is asked of them then comes from this one."""


# --- comparing


@dataclass
class Found:
    """How a row of one file differs from that of another.

    values    numbers in the row's tensors
    changed   of them, those whose bits differ
    ulps      the largest difference in units of the last place; inf where one side is NaN
    relative  the largest difference as a share of the largest number of its tensor
    where     the tensor with the largest difference, or what is wrong with the row as such
    """

    name: str
    values: int = 0
    changed: int = 0
    ulps: float = 0.0
    relative: float = 0.0
    where: str = ""
    broken: bool = False

    @property
    def identical(self) -> bool:
        return not (self.changed or self.broken)


def ulps(old: Tensor, new: Tensor) -> Tensor:
    """Numbers of the dtype that lie between each pair, in float64; inf beside NaN. 0 and -0 are 0 apart."""
    kind = INTEGERS[old.element_size()]
    a, b = (t.view(kind).long() for t in (old, new))
    top = torch.iinfo(kind).max
    apart = torch.where((a < 0) == (b < 0), (a - b).abs().double(), (a & top).double() + (b & top).double())
    return torch.where(old.isnan() ^ new.isnan(), math.inf, apart)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()]) if tensor.is_floating_point() else tensor


def compare_row(name: str, old: Mapping[str, Tensor] | str | None, new: Mapping[str, Tensor] | str | None) -> Found:
    if old is None or new is None:
        return Found(name, where=f"missing in the {'old' if old is None else 'new'} file", broken=True)
    if isinstance(old, str) or isinstance(new, str):
        if old == new:
            return Found(name)
        raised = [side if isinstance(side, str) else "no error" for side in (old, new)]
        return Found(name, where=f"raised {raised[0]!r} before, {raised[1]!r} now", broken=True)
    found = Found(name)
    for part in {**old, **new}:
        if part not in old or part not in new:
            found.where, found.broken = f"{part}: missing in the {'new' if part in old else 'old'} file", True
            return found
        _compare_part(found, part, old[part], new[part])
        if found.broken:
            break
    return found


def _compare_part(found: Found, part: str, old: Tensor, new: Tensor) -> None:
    if old.shape != new.shape or old.dtype != new.dtype:
        forms = [f"{t.dtype} {list(t.shape)}" for t in (old, new)]
        found.where, found.broken = f"{part}: {forms[0]} before, {forms[1]} now", True
        return
    old, new = old.contiguous(), new.contiguous()
    changed = int((bits(old) != bits(new)).sum())
    found.values += old.numel()
    found.changed += changed
    if not changed:
        return
    wide = [t.double() for t in (old, new)]
    gap, scale = float((wide[1] - wide[0]).abs().max()), float(wide[0].abs().max())
    relative = math.inf if math.isnan(gap) else gap / scale if scale else math.inf if gap else 0.0
    if relative >= found.relative and not found.broken:
        found.where = part
    found.relative = max(found.relative, relative)
    found.ulps = max(found.ulps, float(ulps(old, new).max()) if old.is_floating_point() else gap)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Found]:
    """Every row of both, in the order of the old file."""
    return [compare_row(name, old.get(name), new.get(name)) for name in {**old, **new}]


def blocks(rows: Mapping[str, Any]) -> list[Found]:
    """Each row of blocks of a stated size beside its twin of default blocks."""
    pairs = [(name, name.partition(FIXED)[0]) for name in rows if FIXED in name]
    return [compare_row(name, rows[twin], rows[name]) for name, twin in pairs if twin in rows]


def lines(head: Iterable[str], body: Iterable[Iterable[Any]]) -> str:
    """A table as text: the first column to the left, numbers to the right, the last as it is."""
    rows = [[str(cell) for cell in row] for row in (head, *body)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell if k == last else cell.ljust(w) if k == 0 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def report(found: list[Found]) -> str:
    """Counts by group of rows, then each row that differs."""
    groups: dict[str, list[Found]] = {}
    for row in found:
        group = row.name.partition(":")[0]
        group = group if group.startswith("W") else group.split()[0]
        groups.setdefault(f"{group}, {'stated' if FIXED in row.name else 'default'} blocks", []).append(row)
    body = []
    for group, rows in groups.items():
        same = sum(row.identical for row in rows)
        worst = max(row.relative for row in rows)
        body.append((group, len(rows), same, len(rows) - same, f"{worst:.1e}" if worst else "0"))
    text = lines(("rows", "all", "identical", "different", "by at most, relative"), body)
    wrong = sorted((row for row in found if not row.identical), key=lambda row: (not row.broken, -row.relative))
    if wrong:
        listed = [
            (r.name, f"{r.changed:,} of {r.values:,}", f"{r.ulps:,.0f}", f"{r.relative:.1e}", r.where)
            for r in wrong[:LIMIT]
        ]
        text += "\n\n" + lines(("row", "numbers that differ", "ulps", "relative", "where most"), listed)
        if len(wrong) > LIMIT:
            text += f"\n... and {len(wrong) - LIMIT} more"
        if all(FIXED not in row.name for row in wrong) and not any(row.broken for row in wrong):
            text += "\nOnly rows of default blocks differ: blocks may have another size, and sums another order."
    return text


# --- checkouts


def start(tree: Path, threads: int, **request: Any) -> subprocess.Popen[str]:
    """A process that computes with the packages of ``tree``."""
    tree = tree.resolve()
    paths = [str(tree), str(tree / "python")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    wanted = json.dumps({**request, "threads": threads, "tree": str(tree), "root": str(machine.ROOT)})
    command = [sys.executable, "-c", CHILD, wanted]
    return subprocess.Popen(
        command, cwd=tree, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def save(file: Path, tree: Path, threads: int, only: str) -> None:
    facts = {
        "commit": machine.commit(tree),
        "torch": torch.__version__,
        "cpu": machine.cpu_name(),
        "threads": str(threads),
    }
    child = start(tree, threads, do="save", path=str(file.resolve()), facts=facts, only=only)
    child.communicate()
    if child.returncode:
        raise SystemExit(f"no results of {tree}: its process ended with status {child.returncode}")


def load(file: Path) -> tuple[dict[str, str], dict[str, Any]]:
    kept = torch.load(file, weights_only=True)
    return kept["facts"], kept["rows"]


# --- speed


@dataclass
class Times:
    """CPU seconds here and there, measured right after one another."""

    pairs: list[tuple[float, float]] = field(default_factory=list)

    def row(self, name: str) -> tuple[str, ...]:
        """name, rounds, milliseconds there and here, median ratio, its 95 % interval and the verdict."""
        ratios = [here / there for there, here in self.pairs]
        there, here = (1e3 * statistics.median(side) for side in zip(*self.pairs, strict=True))
        low, high = interval(ratios)
        middle = f"{statistics.median(ratios):.3f}"
        return (name, str(len(ratios)), f"{there:,.1f}", f"{here:,.1f}", middle, *verdict(low, high))


def verdict(low: float, high: float) -> tuple[str, str]:
    """The interval in words, and what it says about a change of 3 %: nothing where it holds both sides of that line."""
    if math.isinf(high):
        return "too few rounds", "unclear"
    said = (
        "slower" if low > 1.03 else "faster" if high < 0.97 else "same" if low >= 0.97 and high <= 1.03 else "unclear"
    )
    return f"{low:.3f} to {high:.3f}", said


def interval(values: list[float]) -> tuple[float, float]:
    """Two of the values between which the median lies at 95 % or more, whatever their distribution; fewer than six
    values have no such two: (0, inf)."""
    n, below, k = len(values), 0.0, 0
    while (below := below + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    return (sorted(values)[k - 1], sorted(values)[n - k]) if k else (0.0, math.inf)


class Runner:
    """A process of one checkout that times what it is told to."""

    def __init__(self, tree: Path, threads: int) -> None:
        self._child = start(tree, threads, do="time")
        self.imported = self._answer()

    def _answer(self) -> float:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"a timing process ended with status {self._child.wait()}")
        return float(json.loads(line))

    def time(self, job: str) -> float:
        assert self._child.stdin is not None
        self._child.stdin.write(job + "\n")
        self._child.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._child.communicate()


def speed(there: Path, here: Path, jobs: list[str], starts: int, rounds: int, threads: int) -> dict[str, Times]:
    """``starts`` pairs of fresh processes, in each ``rounds`` of every job: the two in turn, in alternating order."""
    times: dict[str, Times] = {}
    for number in range(starts):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        made = {side: Runner((there, here)[side], threads) for side in order}
        times.setdefault("import", Times()).pairs.append((made[0].imported, made[1].imported))
        for job in jobs:
            for turn in range(rounds + 1):
                spent = {side: made[side].time(job) for side in (order if turn % 2 == 0 else order[::-1])}
                name = job if turn else f"{job}, the first"
                times.setdefault(name, Times()).pairs.append((spent[0], spent[1]))
        for runner in made.values():
            runner.close()
    return times


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("save", help="write every estimator's results")
    one.add_argument("file", type=Path)
    one.add_argument("--tree", type=Path, default=machine.ROOT, help="the checkout whose packages compute (this one)")
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--only", default="", help="rows whose names contain this (all)")
    two = commands.add_parser("compare", help="two files of results, bit by bit")
    two.add_argument("old", type=Path)
    two.add_argument("new", type=Path)
    three = commands.add_parser("blocks", help="rows of default blocks beside blocks of a stated size, in one file")
    three.add_argument("file", type=Path)
    four = commands.add_parser("speed", help="CPU time here against another checkout")
    four.add_argument("other", type=Path)
    four.add_argument("--tree", type=Path, default=machine.ROOT, help="the checkout to judge (this one)")
    four.add_argument("--work", default="W1,W2,W3,W4", help="by commas (all)")
    four.add_argument("--starts", type=int, default=4, help="pairs of fresh processes (4)")
    four.add_argument("--rounds", type=int, default=6, help="rounds of each job in a process (6)")
    four.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    return {"save": _save, "compare": _compare, "blocks": _blocks, "speed": _speed}[options.command](options)


def _save(options: argparse.Namespace) -> int:
    save(options.file, options.tree, options.threads, options.only)
    return 0


def _compare(options: argparse.Namespace) -> int:
    (old_facts, old), (new_facts, new) = load(options.old), load(options.new)
    for fact in old_facts:
        print(f"{fact}: {old_facts[fact]}" + (f" and {new_facts[fact]}" if new_facts[fact] != old_facts[fact] else ""))
    found = compare(old, new)
    print(f"\n{report(found)}")
    return int(not all(row.identical for row in found))


def _blocks(options: argparse.Namespace) -> int:
    print(report(blocks(load(options.file)[1])))
    return 0


def _speed(options: argparse.Namespace) -> int:
    there, here = options.other.resolve(), options.tree.resolve()
    print(f"{machine.commit(there)} before, {machine.commit(here)} now; CPU time, {options.threads} thread(s)")
    times = speed(
        there,
        here,
        [f"{work}: {name}" for work in options.work.split(",") for name in TIMED],
        options.starts,
        options.rounds,
        options.threads,
    )
    head = ("row", "rounds", "ms before", "ms now", "now/before", "95 % of the median", "3 %")
    print(lines(head, (t.row(name) for name, t in times.items())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
