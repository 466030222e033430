"""How small may the step be? Quotients of the paper's CNN from mu = 1e-1 to 1e-8, three ways.

    python benchmarks/mu_sweep.py

Sampled coordinates of every tensor of the 9,640-weight CNN (depth 4, width 18) in training mode, on handwritten digits
enlarged to 32x32: the plain float32 loop, and difference propagation in float32 and bfloat16. Each is compared with
float64 quotients of the same step (what precision costs) and with the float64 gradient (what precision and the step
cost together). Writes results/mu_sweep.csv and ../docs/figures/mu_sweep.png; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import platform
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deepzero as dz

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from judge import judge

ROOT = Path(__file__).resolve().parent.parent
MUS = (1e-1, 3e-2, 1e-2, 5e-3, 1e-3, 1e-4, 1e-5, 5e-6, 1e-6, 5e-7, 1e-7, 1e-8)
PLAIN_MU = (
    1e-4  # below it a plain float64 quotient is noise at 1e-16 / mu: the reference propagates float64 differences
)
BAR, BAR_SLOPE = 1e-5, 5e-5

PLAIN, OURS, OURS_HALF = "plain float32 loop", "deepzero float32", "deepzero bfloat16"

Batch = tuple[Tensor, Tensor]
Quotients = dict[str, Tensor]


def objective(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def digits(count: int) -> Batch:
    """Real pixels that every installation has: images [n, 3, 32, 32] with mean 0 and deviation 1, and their labels."""
    data = dz.data.digits()
    images = F.interpolate(data.train_images[:count].float(), size=32, mode="bilinear", align_corners=False)
    images = (images - images.mean()) / images.std()
    return images.expand(-1, 3, -1, -1).contiguous(), data.train_labels[:count].long()


def sample(model: nn.Module, each: int) -> dict[str, Tensor]:
    """A mask with ``each`` coordinates of every tensor, or all of a smaller one."""
    generator = torch.Generator().manual_seed(0)
    mask = {}
    for name, p in model.named_parameters():
        chosen = torch.zeros(p.numel(), dtype=torch.bool)
        chosen[torch.randperm(p.numel(), generator=generator)[:each]] = True
        mask[name] = chosen.reshape(p.shape)
    return mask


def plain(model: nn.Module, batch: Batch, mask: dict[str, Tensor], mu: float, dtype: torch.dtype) -> Quotients:
    """The loop as it is usually written, all in ``dtype``: add mu, run the model, divide by mu, put the weight back."""
    twin, data = copy.deepcopy(model).to(dtype), (batch[0].to(dtype), batch[1])
    found = {}
    with torch.no_grad():
        base = objective(twin, data)
        for name, p in twin.named_parameters():
            found[name] = torch.zeros(p.shape, dtype=torch.float64)
            for at in map(tuple, mask[name].nonzero().tolist()):
                before = p[at].clone()
                p[at] = before + mu
                found[name][at] = ((objective(twin, data) - base) / mu).double()
                p[at] = before
    return found


def propagated(model: nn.Module, batch: Batch, mask: dict[str, Tensor], precision: str) -> dict[float, Quotients]:
    estimator = dz.CGE(model, objective, precision=precision, strict=True)
    found = {}
    for mu in MUS:
        estimator.mu = mu
        found[mu] = {name: g.double() for name, g in estimator.estimate(batch, mask).grads.items()}
    return found


def gradient(model: nn.Module, batch: Batch, mask: dict[str, Tensor]) -> Quotients:
    twin = copy.deepcopy(model).double()
    loss = objective(twin, (batch[0].double(), batch[1]))
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    return {name: g * mask[name] for (name, _), g in zip(twin.named_parameters(), grads, strict=True)}


def relative(got: Quotients, wanted: Quotients) -> float:
    """|got - wanted| / |wanted| over the whole vector."""
    top = math.sqrt(sum(float((got[k] - q).square().sum()) for k, q in wanted.items()))
    return top / math.sqrt(sum(float(q.square().sum()) for q in wanted.values()))


def cosine(got: Quotients, wanted: Quotients) -> float:
    a = torch.cat([got[k].flatten() for k in wanted])
    b = torch.cat([q.flatten() for q in wanted.values()])
    return float(a @ b / (a.norm() * b.norm())) if float(a.norm()) else 0.0


def sweep(count: int, each: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    model = dz.models.paper_cnn(depth=4, width=18).train()
    batch, mask = digits(count), sample(model, each)
    slope = gradient(model, batch, mask)
    wide = copy.deepcopy(model).double()
    exact = propagated(wide, (batch[0].double(), batch[1]), mask, "float64")
    ours = {OURS: propagated(model, batch, mask, "float32"), OURS_HALF: propagated(model, batch, mask, "bfloat16")}
    rows: list[dict[str, object]] = []
    for mu in MUS:
        same = plain(model, batch, mask, mu, torch.float64) if mu >= PLAIN_MU else exact[mu]
        methods = {PLAIN: plain(model, batch, mask, mu, torch.float32)} | {name: q[mu] for name, q in ours.items()}
        for name, got in methods.items():
            rows.append(
                {
                    "method": name,
                    "mu": mu,
                    "error_same_step": relative(got, same),
                    "worst_tensor_same_step": judge(got, same).error,
                    "error_gradient": relative(got, slope),
                    "worst_tensor_gradient": judge(got, slope).error,
                    "cosine_gradient": cosine(got, slope),
                    "reference": "plain float64" if mu >= PLAIN_MU else "propagated float64",
                }
            )
            print(f"mu {mu:7.0e}  {name:20s} same step {rows[-1]['error_same_step']:8.1e}", end="")
            print(f"  gradient {rows[-1]['error_gradient']:8.1e}", flush=True)
    return rows


def read(path: Path) -> list[dict[str, object]]:
    """Rows that :func:`write` wrote."""
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def missed(rows: list[dict[str, object]]) -> list[str]:
    """The promises that the rows break, in words."""
    out = []
    for row in rows:
        mu, error = float(str(row["mu"])), float(str(row["worst_tensor_same_step"]))
        if row["method"] == OURS and not error <= BAR:
            out.append(f"float32 at mu = {mu:g} is {error:.2g} from same-step float64, allowed {BAR:g}")
        error = float(str(row["worst_tensor_gradient"]))
        if row["method"] == OURS and mu == min(MUS) and not error <= BAR_SLOPE:
            out.append(f"float32 at mu = {mu:g} is {error:.2g} from the gradient, allowed {BAR_SLOPE:g}")
    return out


def about() -> list[str]:
    """What the rows were measured with."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return [f"commit: {commit}", f"torch: {torch.__version__}", f"cpu: {cpu}"]


def write(rows: list[dict[str, object]], path: Path, what: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        for line in [what, *about()]:
            file.write(f"# {line}\n")
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


STYLE = {
    PLAIN: ("#c0392b", "s", "the paper's loop in float32"),
    OURS_HALF: ("#e08e0b", "^", "deepzero, bfloat16 operands"),
    OURS: ("#1f5fa8", "o", "deepzero, float32"),
}


def draw(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.9), sharey=True, layout="constrained")
    panels = (
        (axes[0], "error_same_step", "against float64 quotients with the same step\n(what the precision costs)"),
        (axes[1], "error_gradient", "against the gradient in float64\n(precision and step together)"),
    )
    for axis, key, title in panels:
        for method, (colour, marker, label) in STYLE.items():
            points = [(float(str(r["mu"])), float(str(r[key]))) for r in rows if r["method"] == method]
            axis.loglog(*zip(*points, strict=True), color=colour, marker=marker, ms=5, lw=1.8, label=label)
        axis.axvline(5e-3, color="0.6", lw=1, ls=":")
        axis.axhline(1, color="0.6", lw=1, ls=":")
        axis.set_title(title, fontsize=10.5)
        axis.set_xlabel("step mu (weight units)")
        axis.set_xlim(2e-1, 5e-9)  # smaller steps to the right
        axis.set_xticks([10.0**-k for k in range(1, 9)])
        axis.grid(True, which="major", color="0.92")
        axis.minorticks_off()
        axis.set_axisbelow(True)
    axes[0].set_ylabel("relative error of the quotient vector")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low / 2, high * 2)
    axes[0].axhline(BAR, color="0.6", lw=1, ls=":")
    axes[0].text(4.4e-3, BAR * 1.25, "promised for float32: 1e-5 at every step", fontsize=8.5, color="0.4")
    axes[1].text(4.4e-3, 1.25, "error as large as the gradient", fontsize=8.5, color="0.4")
    axes[1].text(4.4e-3, 2e-7, "the paper's\nstep, 5e-3", fontsize=8.5, color="0.4", va="center")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Finite differences of a 9,640-weight CNN: the plain loop collapses, propagated differences do not")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="batch size")
    parser.add_argument("--coordinates", type=int, default=8, help="sampled coordinates of each of the tensors")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "mu_sweep.csv")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "mu_sweep.png")
    parser.add_argument("--redraw", action="store_true", help="draw and judge the rows of --results, measure nothing")
    options = parser.parse_args(arguments)
    if options.redraw:
        rows = read(options.results)
    else:
        rows = sweep(options.images, options.coordinates)
        what = (
            f"paper CNN, depth 4, width 18, 9,640 weights, training mode; {options.images} digits at 3x32x32; "
            f"{options.coordinates} coordinates a tensor"
        )
        write(rows, options.results, what)
    draw(rows, options.figure)
    for line in missed(rows):
        print(f"MISSED: {line}", file=sys.stderr)
    return 1 if missed(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
