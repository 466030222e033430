"""Ours beside plain loops, block-level reuse and vmap on one GPU, and what its counts predict for an H100.

    python -m benchmarks.gpu [--work W5,W1] [--only ours,reuse] [--out FILE.csv] [--budget 420]
    python -m benchmarks.gpu --device cpu --quick [--out FILE.csv]     # a rehearsal without a GPU, on a tiny model
    python -m benchmarks.gpu --predict                                 # counts -> results/gpu-predicted.csv
    python -m benchmarks.gpu --report                                  # committed rows -> docs/gpu.md

Every measurement runs in a process of its own, one after another, and its row is written when it is there: whatever
fails or hangs later costs its own row only. Float32 is float32: TF32 is off for all. A time is wall time between two
moments at which the GPU is idle.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deepzero as dz
import dzkernels

from . import cases, floors, machine, peers
from .cases import Case, Group, Work, build, layers, sample
from .report import insert, read
from .throughput import RESULTS, plain, record

PAGE = machine.ROOT / "docs" / "gpu.md"
PREDICTED = RESULTS / "gpu-predicted.csv"
KEY = ("work", "contender", "setting", "dtype", "device")
SETTINGS = ("default", "tuned")
"""default: as users run it; tuned: cuDNN's algorithms measured, ours with DZ_TUNE=1, loops in channels-last memory and
replayed as CUDA graphs, vmap with its best chunk."""

_RESNET = cases.WORKS["W2"]
WORKS: dict[str, Work] = {
    "W5": replace(_RESNET, title="ResNet-20, batch 128, 90 % sparse", batch=128),
    "W5b": replace(_RESNET, title="ResNet-20, batch 256, 90 % sparse", batch=256),
    "W1": cases.WORKS["W1"],
    "W4": cases.WORKS["W4"],
}
QUICK: dict[str, Work] = {
    "quick": Work(
        "tiny CNN", lambda: dz.models.paper_cnn(2, width=3), (3, 8, 8), 6, layers, 202, 0.5, chunk=8, sample=24
    )
}

H100 = {"float32_flops": 66.9e12, "bfloat16_flops": 989e12, "memory_bytes": 3.35e12}
"""NVIDIA's data sheet of the H100 SXM: dense FLOP/s, float32 without tensor cores; bytes/s of its memory."""


# --- loops without Python between the kernels


def replayed(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """``function`` as a CUDA graph that a call replays, reading the memory it read when captured; itself on a CPU."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # cuDNN chooses and allocates before the capture
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()

    def replay() -> Tensor:
        graph.replay()
        return out.clone()

    return replay


class ReplayedLoop(peers.Loop):
    """The plain loop, its forward pass replayed."""

    def __init__(self, case: Case, groups: Iterable[Group]) -> None:
        super().__init__(case, list(groups))
        self.graphs: dict[int, Callable[[], Tensor]] = {}

    def forward(self, name: str) -> Callable[[], Tensor]:
        if 0 not in self.graphs:
            self.graphs[0] = replayed(super().forward(name), self.case.device)
        return self.graphs[0]


class ReplayedReuse(peers.Reuse):
    """Block-level reuse, the rest of the network after each block replayed; block inputs keep their memory."""

    def __init__(self, case: Case, groups: Iterable[Group]) -> None:
        super().__init__(case, list(groups))
        self.graphs: dict[int, Callable[[], Tensor]] = {}

    @torch.no_grad()
    def base(self) -> float:
        kept = self.inputs
        loss = super().base()
        if kept:
            for old, new in zip(kept, self.inputs, strict=True):
                old.copy_(new)
            self.inputs = kept
        return loss

    def forward(self, name: str) -> Callable[[], Tensor]:
        start = self.start[name]
        if start not in self.graphs:
            self.graphs[start] = replayed(super().forward(name), self.case.device)
        return self.graphs[start]


CONTENDERS: dict[tuple[str, str, str], type[peers.Contender]] = {
    ("ours", "bfloat16", "default"): peers.OursHalf,
    ("ours", "float32", "default"): peers.Ours,
    ("block reuse", "float32", "default"): peers.Reuse,
    ("block reuse", "float32", "tuned"): ReplayedReuse,
    ("plain loop", "float32", "default"): peers.Loop,
    ("plain loop", "float32", "tuned"): ReplayedLoop,
    ("ours", "bfloat16", "tuned"): peers.OursHalf,
    ("ours", "float32", "tuned"): peers.Ours,
    ("vmap", "float32", "tuned"): peers.BestVmap,
}
"""(name, dtype, setting) -> how it is done, the most wanted first."""


# --- in a process of its own


def prepare(setting: str) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = setting == "tuned"
    os.environ["DZ_TUNE"] = str(int(setting == "tuned"))
    torch.set_num_threads(1)


def ceilings(device: str) -> tuple[dict[str, float], dict[str, str]]:
    """What the device can do at most, and what it and its software are called."""
    prepare("default")
    facts = {"device": machine.cpu_name(), "capability": "", "multiprocessors": "", "cuda": "", "cudnn": ""}
    if device == "cpu":
        return machine.ceilings(), facts
    card = torch.cuda.get_device_properties(device)
    facts = {
        "device": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": str(card.multi_processor_count),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }
    return machine.gpu_ceilings(), facts


def reference(name: str, device: str) -> dict[str, Any]:
    """Float64 quotients of the sample by the plain loop on the device, whose base loss must be the CPU's."""
    prepare("default")
    work = (WORKS | QUICK)[name]
    case = build(work).double()
    there = case.to(device)
    groups = sample(case, work.sample)
    loop = peers.Loop(there, groups)
    here, base = peers.Loop(case, groups).base(), loop.base()
    if not math.isclose(here, base, rel_tol=1e-10):  # float32 or TF32 anywhere would miss by 1e-7 or more
        raise RuntimeError(f"the float64 loss is {base!r} on {device} and {here!r} on the CPU")
    return plain(loop.quotients())  # type: ignore[no-any-return]


def measure(
    name: str, key: tuple[str, str, str], device: str, seconds: float, rounds: int, wanted: dict[str, Any]
) -> dict[str, Any]:
    """Agreement with ``wanted`` and seconds per query of one contender on one work."""
    prepare(key[2])
    work, kind = (WORKS | QUICK)[name], CONTENDERS[key]
    case = build(work).to(device)
    groups = sample(case, work.sample)
    contender = kind(case.channels_last() if key[2] == "tuned" and kind.layout else case, groups)
    first = contender.seconds(contender.first)
    error, cosine = peers.agreement(plain(contender.quotients()), wanted)
    for _ in range(3):  # what is compiled on the way to a larger part of the mask would count as its time
        contender.settle(seconds)
    contender.round()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < rounds or time.perf_counter() - began < seconds:
        times.append(contender.round())
        if len(times) >= 3 and time.perf_counter() - began > 4 * seconds:
            break
    peak = torch.cuda.max_memory_allocated(device) if device != "cpu" else 0
    return {
        "error": error,
        "cosine": cosine,
        "times": times,
        "first": first,
        "queries": contender.queries,
        "how": contender.how,
        "peak": peak,
    }


def serve(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send(("ok", function(*arguments)))
    except Exception as error:
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {error}".splitlines()[0]))


# --- in the parent


class Failed(Exception):
    """A process that gave no answer, and why."""


def ask(function: Callable[..., Any], *arguments: Any, limit: float, watch: Callable[[], Any] | None = None) -> Any:
    """What ``function(*arguments)`` gives in a fresh process; ``watch`` is called twice a second meanwhile.

    Raises :class:`Failed` when it raises, dies or takes longer than ``limit`` seconds.
    """
    context = multiprocessing.get_context("forkserver")  # it never touches the GPU, so its children may
    context.set_forkserver_preload(["benchmarks.peers"])
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, function, arguments), daemon=True)
    process.start()
    there.close()
    began = time.perf_counter()
    try:
        while not here.poll(0.5):
            if watch is not None:
                watch()
            if time.perf_counter() - began > limit:
                raise Failed(f"took longer than {limit:g} s")
        kind, value = here.recv()
    except EOFError:
        process.join(5)
        raise Failed(f"the process died with code {process.exitcode}") from None
    finally:
        here.close()
        process.join(0.2)
        if process.is_alive():
            process.kill()
            process.join(5)
    if kind == "failed":
        raise Failed(value)
    return value


class Clocks:
    """What nvidia-smi shows of the first GPU while it works; nothing where there is none."""

    fields = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def __call__(self) -> None:
        text = _nvidia_smi(*self.fields)
        found = [re.fullmatch(r"[\d.]+", part.strip()) for part in text.split(",")]
        if len(found) == len(self.fields) and all(found):
            self.seen.append([float(match.group()) for match in found if match])

    def columns(self) -> dict[str, str]:
        """Lowest to highest value seen of each field: MHz, MHz, W, degrees Celsius."""
        names = ("sm_mhz", "memory_mhz", "power_w", "celsius")
        ranges = [f"{min(v):g} to {max(v):g}" for v in zip(*self.seen, strict=True)] or [""] * len(names)
        return dict(zip(names, ranges, strict=True))


def _nvidia_smi(*fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def software() -> dict[str, str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "commit": machine.commit(),
        "deepzero": dz.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "cuda_kernels": " ".join(dzkernels.build_info()["cuda_archs"]) or "none",
        "driver": _nvidia_smi("driver_version"),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


@functools.cache
def counted(model: str) -> tuple[floors.Floor, int]:
    """(least per query and image, coordinates of the mask) of the work of that name, counted now."""
    work = (WORKS | QUICK)[model]
    return floors.count(replace(work, batch=1)), build(work, batch=1).count


@functools.cache
def moved(model: str) -> tuple[float, float] | None:
    """Bytes a query and image of that work moves by the plan of a GPU, and with convolutions and norms apart.

    None where both are the same: a plan without such convolutions is not counted.
    """
    work = replace((WORKS | QUICK)[model], batch=1)
    fused, apart = (floors.planned(work, fused=both) for both in (True, False))
    return None if fused == apart else (fused, apart)


def counts(name: str) -> tuple[floors.Floor, int]:
    """(least per query, coordinates of the mask) of a work: the counts that ``--predict`` wrote, for no GPU waits here.

    Raises :class:`FileNotFoundError` without them.
    """
    if name in QUICK:
        one, count = counted(name)
    else:
        line = next(line for line in read(PREDICTED) if line["work"] == name)
        one = floors.Floor(float(line["flops_per_query_image"]), float(line["values_per_query_image"]))
        count = int(line["mask_queries"])
    return _times(one, (WORKS | QUICK)[name].batch), count


def _times(one: floors.Floor, batch: int) -> floors.Floor:
    return floors.Floor(batch * one.flops, batch * one.values)


def row(
    name: str, key: tuple[str, str, str], found: dict[str, Any] | str, tops: dict[str, float], same: dict[str, str]
) -> dict[str, str]:
    """One line of the table; ``found`` is what :func:`measure` gives, or why there is nothing."""
    contender, dtype, setting = key
    floor, count = counts(name)
    out = {"work": name, "contender": contender, "setting": setting, "dtype": dtype}
    work = (WORKS | QUICK)[name]
    columns = {"model": work.title, "mask_queries": str(count)}
    if isinstance(found, str):
        return out | {"verdict": found} | columns | same
    times = torch.tensor(found["times"], dtype=torch.float64)
    each = statistics.median(found["times"])
    size = 2 if dtype == "bfloat16" else 4
    arithmetic, traffic = floor.seconds(tops, dtype)
    measured = {
        "verdict": "ok" if found["cosine"] >= peers.LIMIT else "wrong",
        "queries_per_s": number(1 / each),
        "step_s": number(each * (count + 1)),
        "us_per_query": number(each * 1e6),
        "p20_us": number(float(times.quantile(0.2)) * 1e6),
        "p80_us": number(float(times.quantile(0.8)) * 1e6),
        "rounds": str(len(times)),
        "queries": str(found["queries"]),
        "how": found["how"],
        "error": number(found["error"]),
        "cosine": f"{found['cosine']:.6f}",
        "first_call_s": number(found["first"]),
        "peak_gib": number(found["peak"] / 2**30),
    }
    if contender == "ours":  # the others do more than the counted products
        measured |= {
            "of_bfloat16_peak": number(floor.flops / each / tops["bfloat16_flops"]),
            "of_float32_peak": number(floor.flops / each / tops["float32_flops"]),
            "of_bandwidth": number(2 * size * floor.values / each / tops["memory_bytes"]),
            "of_floor": number(max(arithmetic, traffic) / each),
        }
    return out | measured | columns | same


def number(value: float) -> str:
    return f"{value:.4g}"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="where to measure (cuda)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--work", default="", help=f"which of {', '.join(WORKS)}, by commas (all)")
    parser.add_argument("--only", default="", help="contenders whose name and dtype contain one of these (all)")
    parser.add_argument("--setting", default=",".join(SETTINGS), help="which settings, by commas (both)")
    parser.add_argument("--seconds", type=float, default=4.0, help="measure each contender about so long (4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each contender at least (5)")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds after which a contender is ended (90)")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which none is started (420)")
    parser.add_argument("--out", type=Path, help="the table; by default results/gpu-<device>.csv, and none for a CPU")
    parser.add_argument(
        "--predict", action="store_true", help="count, write results/gpu-predicted.csv, measure nothing"
    )
    parser.add_argument("--report", action="store_true", help="write the committed rows into docs/gpu.md, and no more")
    options = parser.parse_args(arguments)
    works = QUICK if options.quick else WORKS
    options.work = options.work.split(",") if options.work else list(works)
    if unknown := [name for name in options.work if name not in works]:
        raise SystemExit(f"no work called {', '.join(unknown)}: there are {', '.join(works)}")
    if unknown := [name for name in options.setting.split(",") if name not in SETTINGS]:
        raise SystemExit(f"no setting called {', '.join(unknown)}: there are {', '.join(SETTINGS)}")
    wanted = [part for part in options.only.split(",") if part]
    options.contenders = [
        key
        for key in CONTENDERS
        if key[2] in options.setting.split(",") and (not wanted or any(part in f"{key[0]} {key[1]}" for part in wanted))
    ]
    if not options.contenders:
        raise SystemExit(f"no contender left: there are {', '.join(sorted({key[0] for key in CONTENDERS}))}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    if options.report:
        write_page()
        return
    if options.predict:
        record(PREDICTED, [prediction(name) for name in WORKS], ("work",))
        write_page()
        return
    began = time.perf_counter()
    try:
        tops, facts = ask(ceilings, options.device, limit=options.limit)
    except Failed as error:
        raise SystemExit(f"nothing can be measured on {options.device}: {error}. --device cpu rehearses") from None
    same = (
        facts
        | software()
        | {
            "peak_float32_tflops": number(tops["float32_flops"] / 1e12),
            "peak_bfloat16_tflops": number(tops["bfloat16_flops"] / 1e12),
            "copy_memory_gbs": number(tops["memory_bytes"] / 1e9),
        }
    )
    print(" ".join(f"{k}={v}" for k, v in same.items()), flush=True)
    out = options.out
    if out is None and options.device == "cuda":
        out = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', facts['device'].lower()).strip('-')}.csv"
    rows = []
    for name in options.work:
        if time.perf_counter() - began > options.budget:
            print(f"{name}: not run, {options.budget:g} s are over", flush=True)
            continue
        try:
            wanted = ask(reference, name, options.device, limit=options.limit)
        except Failed as error:
            print(f"{name}: no float64 reference, so no rows: {error}", flush=True)
            continue
        for key in options.contenders:
            if time.perf_counter() - began > options.budget:
                print(f"{name} {' '.join(key)}: not run, {options.budget:g} s are over", flush=True)
                continue
            clocks = Clocks()
            arguments_ = (name, key, options.device, options.seconds, options.rounds, wanted)
            found: dict[str, Any] | str
            try:
                found = ask(measure, *arguments_, limit=options.limit, watch=clocks)
            except Failed as error:
                found = f"failed: {error}"
            line = row(name, key, found, tops, same | clocks.columns())
            rows.append(line)
            if out is not None:
                record(out, [line], KEY)
            print(
                f"{name} {' '.join(key)}: {line['verdict']} "
                + " ".join(f"{k}={line[k]}" for k in ("queries_per_s", "step_s", "of_floor", "error") if k in line),
                flush=True,
            )
    print(_table(MEASURED, beside_loops(rows)))
    print(f"{time.perf_counter() - began:.0f} s")


# --- what the counts say of a card that nobody has measured


def prediction(name: str) -> dict[str, str]:
    """The floor of a work in bfloat16 on an H100 by its data sheet, half of it, and what the plan moves."""
    model = "W5" if name == "W5b" else name  # but for the batch the same
    one, count = counted(model)
    floor = _times(one, WORKS[name].batch)
    arithmetic, traffic = floor.seconds(H100, "bfloat16")
    least = max(arithmetic, traffic)
    plan = {}
    if (bytes_ := moved(model)) is not None:
        fused, apart = (WORKS[name].batch * b for b in bytes_)
        plan = {
            "plan_mb_per_query": number(fused / 1e6),
            "apart_mb_per_query": number(apart / 1e6),
            "plan_queries_per_s": number(1 / max(arithmetic, fused / H100["memory_bytes"])),
        }
    return {
        "work": name,
        "model": WORKS[name].title,
        "mask_queries": str(count),
        "flops_per_query_image": f"{one.flops:.10g}",
        "values_per_query_image": f"{one.values:.10g}",
        "gflop_per_query": number(floor.flops / 1e9),
        "mb_per_query": number(2 * 2 * floor.values / 1e6),
        "arithmetic_us": number(arithmetic * 1e6),
        "traffic_us": number(traffic * 1e6),
        "floor_us": number(least * 1e6),
        "floor_queries_per_s": number(1 / least),
        "floor_step_s": number(least * (count + 1)),
        "half_queries_per_s": number(0.5 / least),
        "half_step_s": number(2 * least * (count + 1)),
        **plan,
    }


PREDICTION = {
    "work": "work",
    "model": "model",
    "gflop_per_query": "GFLOP a query",
    "mb_per_query": "MB a query",
    "arithmetic_us": "arithmetic, µs",
    "traffic_us": "traffic, µs",
    "floor_queries_per_s": "floor, queries/s",
    "floor_step_s": "floor, s a step",
    "half_queries_per_s": "half of it, queries/s",
    "half_step_s": "half of it, s a step",
    "plan_mb_per_query": "MB a query of the plan",
    "apart_mb_per_query": "with norms apart",
    "plan_queries_per_s": "plan, queries/s at most",
}
MEASURED = {
    "device": "device",
    "work": "work",
    "contender": "contender",
    "dtype": "dtype",
    "setting": "setting",
    "queries_per_s": "queries/s",
    "step_s": "s a step",
    "times_loop": "against the fastest loop",
    "of_floor": "of the floor at the card's measured peaks",
    "of_bfloat16_peak": "of bfloat16 peak",
    "of_bandwidth": "of bandwidth",
    "error": "error",
    "verdict": "verdict",
}
"""column of a row -> its heading in the page"""


def page_rows(predicted: list[dict[str, str]], measured: list[dict[str, str]]) -> str:
    """The committed rows as Markdown."""
    text = [_table(PREDICTION, predicted), ""]
    if not measured:
        return "\n".join([*text, "Measured: nothing yet."])
    return "\n".join([*text, _table(MEASURED, beside_loops(measured))])


def beside_loops(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with ``times_loop``: queries/s over those of the fastest loop, plain or reusing blocks, seen there."""
    best: dict[tuple[str, str], float] = {}
    for line in rows:
        if line["contender"] in ("plain loop", "block reuse") and line.get("queries_per_s"):
            where = (line["work"], line["device"])
            best[where] = max(best.get(where, 0.0), float(line["queries_per_s"]))

    def ratio(line: dict[str, str]) -> str:
        loop = best.get((line["work"], line["device"]))
        return f"{number(float(line['queries_per_s']) / loop)}x" if loop and line.get("queries_per_s") else ""

    return [line | {"times_loop": ratio(line)} for line in rows]


def _table(titles: dict[str, str], rows: list[dict[str, str]]) -> str:
    lines = [list(titles.values()), ["---"] * len(titles), *([r.get(c, "") for c in titles] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def committed() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(predicted, measured) rows under results."""
    found = [read(path) for path in sorted(RESULTS.glob("gpu-*.csv")) if path != PREDICTED]
    return read(PREDICTED), [line for table in found for line in table]


def write_page() -> None:
    text = insert(PAGE.read_text(encoding="utf-8"), page_rows(*committed()))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
