"""Layer-wise pruning ratios: how much of each parameter is left out, with exact counts, from any score."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import MaskError, did_you_mean
from .scores import Scores

KEEP = ("magnitude", "highest", "lowest")
"""Which scores survive: the largest |S| (the paper's code), the largest S, or the smallest (GraSP's first paper)."""


def fraction_left_out(value: float, what: str) -> float:
    """``value`` itself; MaskError when it is no fraction in [0, 1)."""
    if not (math.isfinite(value) and 0 <= value < 1):
        raise MaskError(f"{what} must be the fraction left out, 0 <= fraction < 1, got {value}")
    return value


def kept_count(total: int, pruned: float) -> int:
    """How many of ``total`` coordinates a pruned fraction leaves."""
    return round((1 - pruned) * total)


@dataclass(frozen=True)
class LayerRatios:
    """How much of each parameter is left out: its pruned fraction in [0, 1) and its shape, by parameter name."""

    pruned: Mapping[str, float]
    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, model: nn.Module, pruned: Mapping[str, float]) -> LayerRatios:
        """Ratios for ``model``; parameters with requires_grad that ``pruned`` does not name keep every coordinate.

        Raises MaskError for unknown or frozen names, fractions outside [0, 1) and a parameter pruned to nothing.
        """
        shapes = _trainable(model)
        for name in pruned:
            _known(name, shapes, "the ratios name")
        return cls({name: pruned.get(name, 0.0) for name in shapes}, shapes)

    def __post_init__(self) -> None:
        for name, fraction in self.pruned.items():
            total = self.shapes[name].numel()
            if kept_count(total, fraction_left_out(fraction, f"the ratio of {name!r}")) == 0:
                raise MaskError(
                    f"the ratio {fraction} prunes all {total} coordinates of {name!r}, which would then never be "
                    f"trained. Use at most {1 - 1 / total:.6g}, or freeze the parameter."
                )

    @property
    def kept(self) -> dict[str, int]:
        """Parameter name -> number of coordinates that a mask keeps of it."""
        return {name: kept_count(self.shapes[name].numel(), fraction) for name, fraction in self.pruned.items()}

    def save(self, path: str | Path) -> None:
        """Write JSON: for each parameter its pruned fraction, its shape and how many coordinates are kept."""
        kept = self.kept
        content = {
            name: {"pruned": fraction, "shape": list(self.shapes[name]), "kept": kept[name]}
            for name, fraction in self.pruned.items()
        }
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in content.items())
        Path(path).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> LayerRatios:
        """Read what :meth:`save` wrote, for ``model``.

        Raises MaskError when the file is not such JSON, and for ratios of another model, naming the first parameter
        that does not fit: one that either side lacks, or one of another shape.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            stored = {name: (float(entry["pruned"]), torch.Size(entry["shape"])) for name, entry in content.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as damaged:
            raise MaskError(
                f"{path}: expected ratios as LayerRatios.save writes them, a JSON object of parameter name -> "
                f'{{"pruned", "shape", "kept"}}; reading it failed with {type(damaged).__name__}: {damaged}'
            ) from damaged
        shapes = _trainable(model)
        for name, (_, shape) in stored.items():
            _known(name, shapes, f"{path} is for another model: it names")
            if shape != shapes[name]:
                raise MaskError(
                    f"{path} is for another model: {name!r} has shape {list(shape)} there and {list(shapes[name])} "
                    "here."
                )
        for name in shapes:
            if name not in stored:
                raise MaskError(
                    f"{path} is for another model: it has no ratio for {name!r}. Score this model, or freeze the "
                    "parameter."
                )
        return cls({name: stored[name][0] for name in shapes}, shapes)


def layer_ratios(
    scores: Scores, sparsity: float, *, keep: str = "magnitude", protect: Collection[str] | None = None, least: int = 0
) -> LayerRatios:
    """The pruned fraction of every parameter when the best-scored coordinates of the whole model are kept.

    Of the n coordinates that may be pruned exactly ``round((1 - sparsity) * n)`` are kept, and of a protected parameter
    all. Only fractions are returned: which coordinates a step estimates is the mask policy's draw (the paper's
    layer-wise pruning ratios).

    sparsity  fraction left out, in [0, 1)
    keep      one of :data:`KEEP`
    protect   names of parameters that lose nothing; None protects every vector and scalar (biases and the scales and
              shifts of norms), as the paper's code does; () protects nothing
    least     coordinates that every parameter keeps whatever they score, or all of a smaller one

    Raises MaskError for values outside these ranges, unknown names, scores that are not finite, and a parameter that
    would be pruned to nothing.
    """
    fraction_left_out(sparsity, "sparsity")
    _check_keep(keep)
    if least < 0:
        raise MaskError(f"least must be a number of coordinates, 0 or more, got {least}")
    shapes = {name: value.shape for name, value in scores.values.items()}
    for name in protect or ():
        _known(name, shapes, "protect names")
    protected = {name for name, shape in shapes.items() if len(shape) < 2} if protect is None else set(protect)
    merits = {name: _merit(name, v, keep) for name, v in scores.values.items() if name not in protected}
    total = sum(merit.numel() for merit in merits.values())
    budget = kept_count(total, sparsity)
    floor = {name: min(least, merit.numel()) for name, merit in merits.items()}
    if sum(floor.values()) > budget:
        raise MaskError(
            f"sparsity={sparsity} keeps {budget:,} of {total:,} coordinates and least={least} asks for "
            f"{sum(floor.values()):,}. Use a smaller sparsity or a smaller least."
        )
    kept = _shared_out(merits, floor, budget)
    for name, count in kept.items():
        if count == 0:
            raise MaskError(
                f"sparsity={sparsity} prunes all {merits[name].numel():,} coordinates of {name!r}, whose best score is "
                f"{float(scores.values[name].abs().max()):.3g}. Use a smaller sparsity, least=1, or "
                f"protect=[{name!r}, ...]."
            )
    return LayerRatios({n: 1 - kept[n] / shapes[n].numel() if n in kept else 0.0 for n in shapes}, shapes)


def best_mask(scores: Scores, ratios: LayerRatios, *, keep: str = "magnitude") -> dict[str, Tensor]:
    """Parameter name -> bool tensor of its shape on the CPU: of each the best-scored coordinates, as many as it keeps.

    With the ratios that :func:`layer_ratios` gives for the same ``scores`` and ``keep`` these are the coordinates that
    it counted: what pruning at initialisation trains, and of what the paper's method keeps the ratios only. Ties go to
    the first.

    Raises MaskError for a ``keep`` that is none of :data:`KEEP` and scores that are not finite.
    """
    _check_keep(keep)
    mask = {name: torch.zeros(shape.numel(), dtype=torch.bool) for name, shape in ratios.shapes.items()}
    for name, count in ratios.kept.items():
        best = _merit(name, scores.values[name], keep).argsort(descending=True, stable=True)[:count]
        mask[name][best] = True
    return {name: flat.view(ratios.shapes[name]) for name, flat in mask.items()}


def _shared_out(merits: Mapping[str, Tensor], floor: Mapping[str, int], budget: int) -> dict[str, int]:
    """How many of the ``budget`` best belong to each parameter, once each has its floor."""
    if not merits:
        return {}
    merits = {name: merit.sort(descending=True).values for name, merit in merits.items()}
    rest = torch.cat([merit[floor[name] :] for name, merit in merits.items()])
    # ties are broken by position, so that counts are exact and the same everywhere
    order = rest.argsort(descending=True, stable=True)[: budget - sum(floor.values())]
    sizes = [merit.numel() - floor[name] for name, merit in merits.items()]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    won = torch.bincount(owner[order], minlength=len(sizes)).tolist()
    return {name: floor[name] + count for name, count in zip(merits, won, strict=True)}


def _check_keep(keep: str) -> None:
    if keep not in KEEP:
        raise MaskError(f"keep must be one of {', '.join(map(repr, KEEP))}, got {keep!r}")


def _merit(name: str, score: Tensor, keep: str) -> Tensor:
    value = score.detach().double().cpu().flatten()
    if not bool(value.isfinite().all()):
        raise MaskError(
            f"the score of {name!r} is not finite in {int((~value.isfinite()).sum()):,} of {value.numel():,} "
            "coordinates, so nothing can be ranked. Check the weights, the batch and mu."
        )
    return value.abs() if keep == "magnitude" else value if keep == "highest" else -value


def _trainable(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def _known(name: str, shapes: Mapping[str, torch.Size], what: str) -> None:
    if name not in shapes:
        hint = did_you_mean(name, shapes)
        raise MaskError(f"{what} {name!r}, which is no parameter of the model with requires_grad.{hint}")
