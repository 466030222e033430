"""The studies that ship: plain data for :mod:`deepzero.training.ablate`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .ablate import Study

_BACKPROP = ("estimator.name=backprop", "estimator.options={}")
_SMALL = ("model.name=paper-cnn", "model.options={depth=2, width=8}")  # 786 weights on grey images: the loop can follow
_MUS = ("5e-3", "5e-4", "5e-5", "5e-6", "1e-6", "5e-7", "2e-7")
_FRACTIONS = ("0", "0.5", "0.8", "0.9", "0.95", "0.99")
_CGE = ("estimator.name=cge", "estimator.options={mu=5e-3}")
_HYPERPARAMETERS = (
    "optimizer.name=SGD",
    "optimizer.options={lr=0.1, momentum=0.9, weight_decay=5e-4}",
    "schedule.name=cosine",
    "schedule.warmup_epochs=3",
    "sparsity.fraction=0.9",
)
"""The paper's, of its text and code, but for 50 epochs and batches of 256; mu is in _CGE."""


def _layerwise(score: str, every: str) -> tuple[str, ...]:
    return "sparsity.policy=layerwise", f"sparsity.ratios={score}", f"sparsity.every={every}"


DEEPZERO = _layerwise("zo-grasp-layerwise", "epoch")
"""The paper's masks: drawn anew every epoch by layer-wise ratios, found at the start from function values alone."""

STALE = "stale buffer, rate 0.01"
"""At 90 % sparsity its values are ten steps old in the mean, which wants a smaller rate."""

POLICIES: dict[str, tuple[str, ...]] = {
    "DeepZero": DEEPZERO,
    "DeepZero, published score": _layerwise("zo-grasp", "epoch"),
    "layer-wise, every step": _layerwise("zo-grasp-layerwise", "1"),
    "uniform, every step": (),
    "uniform, every epoch": ("sparsity.every=epoch",),
    "fixed": ("sparsity.policy=fixed",),
    "always on": ('sparsity.always_on=["norm", "bias"]',),
    "masked momentum": ("sparsity.momentum=masked",),
    "cost-aware": ("sparsity.policy=cost-aware",),
    STALE: ("estimator.name=stale", "optimizer.options={lr=0.01, momentum=0.9, weight_decay=5e-4}"),
}
"""Mask policy -> its overrides."""

_ZEROTH_ONLY = ("cost-aware", STALE)  # backpropagation has no cost of a coordinate and keeps no quotients


def protocol(policies: Sequence[str]) -> Study:
    """The paper's experiment: each of ``policies`` (of :data:`POLICIES`) by function values, and by backpropagation
    under the same masks; and what it is compared with."""
    sparse_weights = ("sparsity.policy=fixed", "sparsity.ratios=grasp", "sparsity.weights=sparse")  # the paper's
    cells = {
        "dense: first order": (*_BACKPROP, "sparsity.fraction=0"),
        "sparse weights: first order": (*_BACKPROP, *sparse_weights),
    }
    for name in policies:
        cells[f"{name}: zeroth order"] = (*_CGE, *POLICIES[name])
        if name not in _ZEROTH_ONLY:
            cells[f"{name}: first order"] = (*_BACKPROP, *POLICIES[name])
    return Study("The protocol of DeepZero, 90 % sparsity", cells, _HYPERPARAMETERS)


def equal_queries(coordinates: int, counts: Sequence[int], *, rate: float = 0.1, settings: Sequence[str] = ()) -> Study:
    """Random directions against coordinates, both with q queries a step besides the base loss.

    coordinates  d, of the model that ``settings`` name
    counts       the values of q, at most d: CGE estimates q of the d coordinates, drawn anew each step
    rate         learning rate that suits the gradient. Each estimate gets one that makes its steps as long in the mean
                 square: RGE, whose length is sqrt((q + d) / q) times the gradient's, rate * sqrt(q / (q + d)), and
                 sparse CGE, sqrt(q / d) times, rate * sqrt(d / q); CGE also gets ``rate`` itself
    """

    def cell(name: str, options: str, fraction: float, factor: float) -> list[str]:
        return [
            f"estimator.name={name}",
            f"estimator.options={{{options}}}",
            f"sparsity.fraction={fraction!r}",
            f"optimizer.options.lr={rate * factor:.3g}",
        ]

    d = coordinates
    cells = {f"RGE, q={q}": cell("rge", f"queries={q}, mu=5e-3", 0.0, math.sqrt(q / (q + d))) for q in counts}
    cells |= {f"CGE, q={q}": cell("cge", "mu=5e-3", 1 - q / d, math.sqrt(d / q)) for q in counts}
    cells |= {f"CGE at rate {rate:g}, q={q}": cell("cge", "mu=5e-3", 1 - q / d, 1.0) for q in counts}
    momentum = ("optimizer.name=SGD", "optimizer.options={momentum=0.9, weight_decay=5e-4}")
    return Study("Random directions and coordinates at equal queries", cells, (*settings, *momentum))


def _estimator(name: str, options: str, sparsity: float, rate: float) -> tuple[str, ...]:
    return (
        f"estimator.name={name}",
        f"estimator.options={{{options}}}",
        f"sparsity.fraction={sparsity}",
        f"optimizer.options={{lr={rate}, momentum=0.9, weight_decay=5e-4}}",
    )


_Q, _D = 79, 786
_SPARSE_RATE, _RANDOM_RATE = (round(0.1 * factor, 4) for factor in (math.sqrt(_D / _Q), math.sqrt(_Q / (_Q + _D))))
"""Learning rates that make steps as long as those of the gradient at 0.1, see :func:`equal_queries`."""

STUDIES: dict[str, Study] = {
    "mu": Study(
        "The step mu: propagated differences and the plain float32 loop",
        {
            f"{title}, mu={mu}": (f"estimator.name={name}", f"estimator.options.mu={mu}")
            for title, name in (("deepzero", "cge"), ("plain float32 loop", "plain-loop"))
            for mu in _MUS
        },
        (*_SMALL, "epochs=15"),
    ),
    "q": equal_queries(786, (1, 5, 25, 100), settings=(*_SMALL, "epochs=15")),
    "sparsity": Study(
        "Sparsity of the gradient, masks drawn anew each step",
        {
            f"{title}, fraction={fraction}": (*estimator, f"sparsity.fraction={fraction}")
            for title, estimator in (("zeroth order", ("estimator.name=cge",)), ("first order", _BACKPROP))
            for fraction in _FRACTIONS
        },
    ),
    "mask": Study(
        "Mask policies, 90 % sparsity",
        {name: (*_CGE, *overrides) for name, overrides in POLICIES.items()},
        ("sparsity.fraction=0.9",),
    ),
    "estimator": Study(
        "Estimators, 79 queries a step of 786 weights, central ones 158",
        {
            "CGE, forward": _estimator("cge", "mu=5e-3", 0.9, _SPARSE_RATE),
            "CGE, central": _estimator("cge", 'mu=5e-3, scheme="central"', 0.9, _SPARSE_RATE),
            "CGE with a stale buffer, rate 0.01": _estimator("stale", "mu=5e-3", 0.9, 0.01),
            **{
                f"RGE, {kind}": _estimator("rge", f'queries={_Q}, mu=5e-3, distribution="{kind}"', 0, _RANDOM_RATE)
                for kind in ("gaussian", "sphere", "rademacher", "orthogonal")
            },
            "RGE, central": _estimator("rge", f'queries={_Q}, mu=5e-3, scheme="central"', 0, _RANDOM_RATE),
            "hybrid: CGE on 42 biases, RGE": _estimator("hybrid", f"queries={_Q - 42}, mu=5e-3", 0, _RANDOM_RATE),
            "forward gradient": _estimator("forward-gradient", f"queries={_Q}", 0, _RANDOM_RATE),
            "backpropagation, masks of CGE": _estimator("backprop", "", 0.9, _SPARSE_RATE),
        },
        (*_SMALL, "epochs=15"),
    ),
    "protocol": protocol([*POLICIES]),
}
"""name -> study; one more entry is one more study of ``deepzero ablate``."""
