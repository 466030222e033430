"""Race every contender on every work and record the rows.

    python -m benchmarks.throughput [--work W1,W2] [--only ours,loop] [--seconds 10] [--rounds 5] [--no-gate]

Every contender lives in a process of its own, so that allocator settings, peak memory and first calls stay apart. The
parent asks one at a time for a round, in turn: all see the same machine. A time is CPU time of that process.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import dzkernels

from . import floors, machine, peers
from .cases import DIRECTIONS, WORKS, Work, build, sample

RESULTS = Path(__file__).parent / "results"
KEY = ("work", "estimator", "contender", "setting", "dtype", "isa", "threads")
SETTINGS = ("default", "tuned")
"""default: as users run it; tuned: channels-last memory, freed memory kept, its own best setting where it has one."""

GATE = ("tests/rules", "tests/ops")


# --- in the contender's process


def serve(
    pipe: Connection, name: str, key: tuple[str, str, str] | None, setting: str, threads: int, seconds: float
) -> None:
    """Answer the parent until it hangs up. ``key`` None is the float64 reference."""
    torch.set_num_threads(threads)
    try:
        contender, first = _start(WORKS[name], key, setting)
        pipe.send(("ready", first))
    except ImportError as error:
        pipe.send(("absent", str(error)))
        return
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
        return
    commands: dict[str, Any] = {
        "quotients": contender.quotients,
        "settle": lambda: contender.settle(seconds),
        "round": contender.round,
        "facts": lambda: (contender.queries, contender.how, _resident()),
    }
    while True:
        try:
            command = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("ok", plain(commands[command]())))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))


def _start(work: Work, key: tuple[str, str, str] | None, setting: str) -> tuple[peers.Contender, float]:
    if setting == "tuned":
        dzkernels.keep_freed_memory()
    case = build(work)
    groups = sample(case, work.sample)
    if key is None:
        return _Reference(case.double(), groups), 0.0
    kind = peers.CONTENDERS[key]
    if setting == "tuned":
        kind = peers.TUNED.get(kind, kind)
        case = case.channels_last() if kind.layout else case
    began = time.process_time()
    contender = kind(case, groups)
    contender.first()
    spent = time.process_time() - began
    return contender, max(0.0, spent - contender.seconds(contender.first))


class _Reference(peers.Contender):
    """Float64 quotients with the same step, by plain loops."""

    def first(self) -> None: ...

    def round(self) -> float:
        return 0.0

    def quotients(self) -> dict[str, Any]:
        return {
            "CGE": peers.Loop(self.case, self.groups).quotients(),
            "RGE": peers.RandomLoop(self.case, self.groups).quotients(),
        }


def plain(value: Any) -> Any:
    """Tensors as arrays: pipes would hand tensors over as shared memory, which dies with its process."""
    return pytree.tree_map(lambda v: v.cpu().numpy() if isinstance(v, Tensor) else v, value)


def _resident() -> float:
    """Most MiB that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- in the parent


@dataclass
class Racer:
    key: tuple[str, str, str]
    setting: str
    pipe: Connection
    first: float = 0.0
    trouble: str = ""
    error: float = float("nan")
    cosine: float = float("nan")
    times: list[float] = field(default_factory=list)
    spent: float = 0.0

    def ask(self, command: str) -> Any:
        self.pipe.send(command)
        return self.hear()

    def hear(self) -> Any:
        kind, value = self.pipe.recv()
        if kind in ("absent", "failed"):
            self.trouble = f"{kind}: {value.strip().splitlines()[-1]}"
            return None
        return value

    @property
    def median(self) -> float:
        return statistics.median(self.times) if self.times else float("nan")

    def quantile(self, q: float) -> float:
        return float(torch.tensor(self.times, dtype=torch.float64).quantile(q)) if self.times else float("nan")


def race(name: str, options: argparse.Namespace) -> list[dict[str, str]]:
    """All rows of one work."""
    work = WORKS[name]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.peers"])
    processes: list[Any] = []

    def launch(key: tuple[str, str, str] | None, setting: str) -> Connection:
        here, there = context.Pipe()
        process = context.Process(
            target=serve, args=(there, name, key, setting, options.threads, options.seconds), daemon=True
        )
        process.start()
        there.close()
        processes.append((process, here))
        return here

    racers: list[Racer] = []
    try:
        reference = Racer(("", "float64", ""), "default", launch(None, "default"))
        reference.hear()
        wanted = reference.ask("quotients")
        if reference.trouble:
            raise RuntimeError(f"{name}: the float64 reference {reference.trouble}")
        reference.pipe.close()
        for key, kind in peers.CONTENDERS.items():
            if key[0] not in options.estimator or (options.only and not any(part in key[1] for part in options.only)):
                continue
            for setting in SETTINGS[: 1 if kind.context else 2]:
                racer = Racer(key, setting, launch(key, setting))
                racers.append(racer)
                racer.first = racer.hear() or 0.0
                quotients = None if racer.trouble else racer.ask("quotients")
                if quotients is not None:
                    racer.error, racer.cosine = peers.agreement(quotients, wanted[key[0]])
                    racer.ask("settle")
                print(f"  {name} {' '.join(key)} {setting}: {racer.trouble or f'error {racer.error:.2g}'}", flush=True)
        running = [r for r in racers if not r.trouble]
        while running:
            for racer in list(running):
                began = time.perf_counter()
                value = racer.ask("round")
                racer.spent += time.perf_counter() - began
                if value is not None:
                    racer.times.append(value)
                enough = len(racer.times) >= options.rounds and racer.spent >= options.seconds
                if racer.trouble or enough or (racer.spent > 8 * options.seconds and len(racer.times) >= 3):
                    running.remove(racer)
        ended = {id(r): r.ask("facts") if not r.trouble else (0, "", 0.0) for r in racers}
    finally:
        for process, pipe in processes:
            pipe.close()
            process.join(5)
    return _rows(name, work, racers, ended, options)


def _rows(
    name: str, work: Work, racers: list[Racer], ended: dict[int, Any], options: argparse.Namespace
) -> list[dict[str, str]]:
    print(f"  {name}: floors and ceilings", flush=True)
    floor, case, tops = floors.count(work), build(work), machine.ceilings()
    same = machine.facts(options.threads) | {"gate": options.gate}
    loops = {(r.key[0], r.setting): r.median for r in racers if r.key[1] == "plain loop"}
    rows = []
    for racer in racers:
        estimator, contender, dtype = racer.key
        queries, how, resident = ended[id(racer)]
        arithmetic, traffic = floor.seconds(tops, dtype)
        ours = (estimator, contender) == ("CGE", "ours")
        kind = peers.CONTENDERS[racer.key]
        verdict = racer.trouble or ("context" if kind.context else "ok" if racer.cosine >= peers.LIMIT else "wrong")
        rows.append(
            {
                "work": name,
                "estimator": estimator,
                "contender": contender,
                "setting": racer.setting,
                "dtype": dtype,
                "verdict": verdict,
                "mask_queries": str(case.count if estimator == "CGE" else DIRECTIONS),
                "queries": str(queries),
                "how": how,
                "rounds": str(len(racer.times)),
                "median_us": _number(racer.median * 1e6),
                "p20_us": _number(racer.quantile(0.2) * 1e6),
                "p80_us": _number(racer.quantile(0.8) * 1e6),
                "times_plain": _number(loops.get((estimator, "default"), float("nan")) / racer.median),
                "times_plain_tuned": _number(loops.get((estimator, "tuned"), float("nan")) / racer.median),
                "error": _number(racer.error),
                "cosine": f"{racer.cosine:.6f}",
                "mflop": _number(floor.flops / 1e6) if ours else "",
                "flop_floor_us": _number(arithmetic * 1e6) if ours else "",
                "traffic_floor_us": _number(traffic * 1e6) if ours else "",
                "fraction": _number(max(arithmetic, traffic) / racer.median) if ours else "",
                "first_call_s": _number(racer.first),
                "peak_mib": _number(resident),
                **{key: _number(value / 1e9) for key, value in _ceiling_names(tops).items()},
                **same,
            }
        )
    return rows


def _ceiling_names(tops: dict[str, float]) -> dict[str, float]:
    """Columns in units of 1e9: GFLOP/s and GB/s."""
    return {
        "peak_float32_gflops": tops["float32_flops"],
        "peak_bfloat16_gflops": tops["bfloat16_flops"],
        "copy_cache_gbs": tops["cache_bytes"],
        "copy_memory_gbs": tops["memory_bytes"],
    }


def _number(value: float) -> str:
    return "" if value != value else f"{value:.4g}"


def record(path: Path, rows: list[dict[str, str]], key: tuple[str, ...] = KEY) -> None:
    """Add rows to a table; a row with the same key is replaced."""
    old: list[dict[str, str]] = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            old = list(csv.DictReader(file))
    new = {tuple(row[k] for k in key) for row in rows}
    kept = [row for row in old if tuple(row.get(k, "") for k in key) not in new]
    table = sorted([*kept, *rows], key=lambda row: [row.get(k, "") for k in key])
    columns = list(dict.fromkeys(column for row in [*rows, *kept] for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def gate() -> bool:
    """Whether the tests of rules and kernels pass here: no number from a red tree."""
    command = [sys.executable, "-m", "pytest", *GATE, "-q", "-x", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=machine.ROOT, check=False).returncode == 0


def parser(description: str) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=description)
    out.add_argument("--threads", type=int, default=1, help="threads of each contender (1)")
    out.add_argument("--no-gate", action="store_true", help="do not run the tests first; the rows say so")
    return out


def gated(options: argparse.Namespace) -> None:
    """Set ``options.gate`` for the rows, or end the program."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # read by the contenders' processes when they start
    torch.set_num_threads(options.threads)
    if not options.no_gate and not gate():
        raise SystemExit(f"{' and '.join(GATE)} do not pass here: no rows are written. --no-gate measures anyway.")
    options.gate = "skipped" if options.no_gate else "passed"


def main() -> None:
    arguments = parser("Race every contender on every work and record the rows.")
    arguments.add_argument("--work", default=",".join(WORKS), help=f"which of {', '.join(WORKS)}, by commas")
    arguments.add_argument("--only", default="", help="contenders whose name contains one of these, by commas")
    arguments.add_argument("--estimator", default="CGE,RGE", help="which of CGE, RGE, by commas")
    arguments.add_argument("--seconds", type=float, default=10.0, help="measure each contender at least so long (10)")
    arguments.add_argument("--rounds", type=int, default=5, help="rounds of each contender at least (5)")
    options = arguments.parse_args()
    options.only = [part for part in options.only.split(",") if part]
    names = options.work.split(",")
    if unknown := [name for name in names if name not in WORKS]:
        raise SystemExit(f"no work called {', '.join(unknown)}: there are {', '.join(WORKS)}")
    gated(options)
    for name in names:
        print(f"{name}: {WORKS[name].title}", flush=True)
        rows = race(name, options)
        record(RESULTS / f"throughput-{machine.slug()}.csv", rows)
        for row in rows:
            print(
                f"  {row['estimator']} {row['contender']:12} {row['dtype']:8} {row['setting']:7} "
                f"{row['median_us']:>9} us/query  {row['times_plain']:>6}x  error {row['error']:>9}  {row['verdict']}"
            )
    from .report import render

    render()


if __name__ == "__main__":
    main()
