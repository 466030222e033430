"""The committed rows as a table in docs/benchmarks.md and as the bars of docs/figures/throughput.png.

python -m benchmarks.report [results.csv]
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .cases import WORKS
from .machine import ROOT

RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
FIGURE = ROOT / "docs" / "figures" / "throughput.png"
BEGIN, END = "<!-- rows: begin -->", "<!-- rows: end -->"

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables() -> list[Path]:
    return sorted(RESULTS.glob("throughput-*.csv"))


def _time(row: Row) -> str:
    if not row["median_us"]:
        return row["verdict"]
    spread = f" ({_short(row['p20_us'])} to {_short(row['p80_us'])})"
    return _short(row["median_us"]) + spread


def _short(text: str) -> str:
    if not text:
        return ""
    value = float(text)
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(text: str) -> str:
    return f"{_short(text)}x" if text else ""


COLUMNS = (
    ("estimator", lambda r: r["estimator"]),
    ("contender", lambda r: r["contender"]),
    ("dtype", lambda r: r["dtype"]),
    ("setting", lambda r: r["setting"]),
    ("CPU µs per query", _time),
    ("against plain loop", lambda r: _ratio(r["times_plain"])),
    ("against tuned loop", lambda r: _ratio(r["times_plain_tuned"])),
    ("error", lambda r: f"{float(r['error']):.1e}" if r["error"] else ""),
    ("cosine", lambda r: r["cosine"] if r["error"] else ""),
    ("of the floor", lambda r: f"{100 * float(r['fraction']):.1f} %" if r["fraction"] else ""),
    ("peak MiB", lambda r: _short(r["peak_mib"])),
    ("first call s", lambda r: _short(r["first_call_s"])),
    ("measured", lambda r: f"{r['queries']} of {r['mask_queries']}, {r['how']}" if r["median_us"] else ""),
    ("verdict", lambda r: r["verdict"].split(":")[0]),
)


def markdown(rows: Sequence[Row]) -> str:
    """One table per work, fastest first within an estimator, after the facts that all rows share."""
    out = []
    for work in sorted({row["work"] for row in rows}):
        chosen = [row for row in rows if row["work"] == work]
        chosen.sort(key=lambda r: (r["estimator"], float(r["median_us"] or "inf")))
        title = WORKS[work].title if work in WORKS else work
        out += [f"### {work}: {title}", "", _facts(chosen), ""]
        out.append("| " + " | ".join(name for name, _ in COLUMNS) + " |")
        out.append("|" + "---|" * len(COLUMNS))
        out += ["| " + " | ".join(cell(row) for _, cell in COLUMNS) + " |" for row in chosen]
        out.append("")
    return "\n".join(out)


def _facts(rows: Sequence[Row]) -> str:
    def joined(column: str) -> str:
        return ", ".join(sorted({row[column] for row in rows}))

    floor = next((row for row in rows if row["flop_floor_us"]), None)
    text = (
        f"Commit {joined('commit')}, torch {joined('torch')}, {joined('cpu')} ({joined('isa')}), "
        f"{joined('threads')} thread(s), {joined('date')}, tests before it: {joined('gate')}."
    )
    if floor:
        text += (
            f" Floor: {_short(floor['mflop'])} MFLOP a query; torch.mm reaches {_short(floor['peak_float32_gflops'])} "
            f"GFLOP/s in float32 and {_short(floor['peak_bfloat16_gflops'])} in bfloat16, a copy "
            f"{_short(floor['copy_memory_gbs'])} GB/s in memory and {_short(floor['copy_cache_gbs'])} in cache."
        )
    return text


def bars(rows: Sequence[Row]) -> dict[str, list[tuple[str, float]]]:
    """Work -> (label, times the plain loop) of the quotient contenders as users run them."""
    out: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        if row["setting"] == "default" and row["estimator"] == "CGE" and row["verdict"] == "ok" and row["times_plain"]:
            label = f"{row['contender']} {row['dtype']}" if row["contender"] == "ours" else row["contender"]
            out.setdefault(row["work"], []).append((label, float(row["times_plain"])))
    return {work: sorted(found, key=lambda pair: -pair[1]) for work, found in sorted(out.items())}


COLOURS = {"ours float32": "#1f6feb", "ours bfloat16": "#0b3d91", "plain loop": "#8c959f"}
OTHER = "#c9d1d9"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Queries per CPU second against the plain loop, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = bars(rows)
    height = sum(len(group) for group in groups.values()) + 1.2 * len(groups)
    figure, axes = plt.subplots(
        len(groups) or 1,
        1,
        figsize=(8, 0.28 * height + 0.8),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [len(group) + 1 for group in groups.values()] or [1]},
    )
    for axis, (work, group) in zip(axes[:, 0], groups.items(), strict=False):
        labels, values = [label for label, _ in group], [value for _, value in group]
        drawn = axis.barh(labels, values, color=[COLOURS.get(label, OTHER) for label in labels])
        axis.bar_label(drawn, [f"{value:.3g}x" for value in values], padding=3, fontsize=8)
        axis.set_title(f"{work}: {WORKS[work].title if work in WORKS else ''}", fontsize=9, loc="left")
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.margins(x=0.12)
        axis.tick_params(labelsize=8)
        axis.axvline(1, color="black", linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1, 0].set_xlabel("queries per CPU second, plain loop = 1", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def insert(page: str, text: str) -> str:
    """The page with ``text`` between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def render(paths: Iterable[Path] | None = None) -> None:
    rows = [row for path in (tables() if paths is None else paths) for row in read(path)]
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), markdown(rows)), encoding="utf-8")
    draw(rows, FIGURE)
    print(f"wrote {PAGE.relative_to(ROOT)} and {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    render([Path(argument) for argument in sys.argv[1:]] or None)
