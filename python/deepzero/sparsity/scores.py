"""How much each coordinate matters, from function values alone: ZO-GraSP (Chen et al., ICLR 2024) and its siblings.

Every score is one function ``(model, objective, batch, *, ...) -> Scores``. It reads the model and leaves weights,
buffers, modes, ``.grad`` and random state as they are; random directions follow from ``seed`` alone.

Three ways to sample the gradient and Hessian-gradient product behind a score, told apart by the end of the name:

``zo_grasp``            RGE over all coordinates, as published. With far fewer directions q than coordinates d its noise
                        is the same in every layer and larger than the signal by sqrt(d / q).
``zo_grasp_layerwise``  each direction moves one layer only, so that the same budget measures what differs between them.
``zo_grasp_cge``        one difference a coordinate: exact up to the step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..engine import Prepared
from ..errors import ObjectiveError
from ..estimators.cge import CGE
from ..estimators.engine_estimator import EngineEstimator
from ..estimators.rge import RGE
from ..objective import Objective, selected


@dataclass(frozen=True)
class Scores:
    """A score for every coordinate that may be trained.

    values   parameter name -> tensor of that parameter's shape and device, floating point
    queries  loss values spent, base losses included; 0 for scores that never evaluate the objective
    """

    values: Mapping[str, Tensor]
    queries: int = 0


def zo_grasp(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    *,
    mu: float = 5e-3,
    queries: int = 192,
    seed: int = 0,
    precision: str = "float32",
) -> Scores:
    """ZO-GraSP as published (Chen et al., ICLR 2024, section 4): S = -theta * (g(theta + mu g) - g(theta)) / mu.

    g is RGE with ``queries`` Gaussian directions, the same ones in both estimates and unbiased in scale, so that S is
    an unbiased sample of -theta * (H g) for the smoothed loss up to O(mu) and the noise of g itself. Spends
    2 (queries + 1) loss values. Raises what :class:`RGE` raises.
    """
    estimator = RGE(model, objective, queries=queries, mu=mu, seed=seed, precision=precision)
    return _grasp(estimator, batch)


def zo_grasp_layerwise(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    *,
    mu: float = 5e-3,
    queries: int = 192,
    seed: int = 0,
    precision: str = "float32",
) -> Scores:
    """ZO-GraSP whose ``queries`` directions measure what layer-wise ratios depend on: the layers' differences.

    A layer is one parameter of two or more dimensions; all vectors and scalars together are one more. Layer l gets
    m = queries // layers Gaussian directions u_lk that move it alone. At theta they give the gradient's part
    g_l = (1/m) sum_k (g . u_lk) u_lk; the same directions at theta + mu g give u_lk . H g, hence

        S_l = -theta_l * (1/m) sum_k (u_lk . H g) u_lk * sqrt(m / (m + d_l + 1)).

    The last factor takes out what the noise of m directions in d_l dimensions adds to the second moment: the mean
    square of (H g)_l, which decides the layer's share of the coordinates, is unbiased. RGE over all coordinates spreads
    one noise level over all layers instead. Spends 2 (m layers + 1) loss values, no more than :func:`zo_grasp`.

    Raises what :class:`RGE` raises, and ValueError for fewer queries than layers.
    """
    estimator = _LayerwiseRGE(model, objective, queries=queries, mu=mu, seed=seed, precision=precision)
    return estimator.square_unbiased(_grasp(estimator, batch))


def zo_grasp_cge(
    model: nn.Module, objective: Objective, batch: Any, *, mu: float = 5e-3, precision: str = "float32"
) -> Scores:
    """S = -theta * (g(theta + mu g) - g(theta)) / mu with coordinate-wise g: exact up to the step, 2 (d + 1) losses."""
    estimator = CGE(model, objective, mu=mu, precision=precision)
    return _grasp(estimator, batch)


def zo_snip(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    *,
    mu: float = 5e-3,
    queries: int = 192,
    seed: int = 0,
    precision: str = "float32",
) -> Scores:
    """SNIP's |theta * g| (Lee et al., ICLR 2019) with g by RGE; ``queries`` + 1 loss values."""
    estimator = RGE(model, objective, queries=queries, mu=mu, seed=seed, precision=precision)
    return _snip(estimator, batch)


def zo_snip_layerwise(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    *,
    mu: float = 5e-3,
    queries: int = 192,
    seed: int = 0,
    precision: str = "float32",
) -> Scores:
    """SNIP's |theta * g| with directions that move one layer each, as in :func:`zo_grasp_layerwise`.

    The mean square of g in every layer is unbiased; at most ``queries`` + 1 loss values.
    """
    estimator = _LayerwiseRGE(model, objective, queries=queries, mu=mu, seed=seed, precision=precision)
    return estimator.square_unbiased(_snip(estimator, batch))


def zo_snip_cge(
    model: nn.Module, objective: Objective, batch: Any, *, mu: float = 5e-3, precision: str = "float32"
) -> Scores:
    """SNIP's |theta * g| with coordinate-wise g; d + 1 loss values."""
    return _snip(CGE(model, objective, mu=mu, precision=precision), batch)


def zo_synflow(
    model: nn.Module, objective: Any, batch: Any, *, mu: float = 5e-3, queries: int = 192, seed: int = 0
) -> Scores:
    """SynFlow's |theta * dR/dtheta| (Tanaka et al., NeurIPS 2020), one round, with RGE; see :func:`synflow_network`.

    ``queries`` + 1 values of R in float64; ``objective`` is not evaluated.
    """
    twin, ones = synflow_network(model, batch)
    estimator = RGE(twin, synaptic_flow, queries=queries, mu=mu, seed=seed, precision="float64")
    return _snip(estimator, ones)


def zo_synflow_cge(model: nn.Module, objective: Any, batch: Any, *, mu: float = 5e-3) -> Scores:
    """SynFlow's |theta * dR/dtheta| with coordinate-wise differences, which R, linear in each weight, makes exact."""
    twin, ones = synflow_network(model, batch)
    return _snip(CGE(twin, synaptic_flow, mu=mu, precision="float64"), ones)


def _grasp(estimator: EngineEstimator, batch: Any) -> Scores:
    """-theta * (g(theta + mu g) - g(theta)) / mu, with g from ``estimator``."""
    start = estimator.state_dict()
    here = estimator.estimate(batch)
    model, mu = estimator.model, estimator.mu
    moved = {name: model.get_parameter(name).double() + mu * g for name, g in here.grads.items()}
    estimator.load_state_dict(start)  # the same random directions again
    with estimator.engine.at(moved):
        there = estimator.estimate(batch)
    values = {
        name: -model.get_parameter(name).detach() * (there.grads[name] - g) / mu for name, g in here.grads.items()
    }
    return Scores(values, here.queries + there.queries)


def _snip(estimator: EngineEstimator, batch: Any) -> Scores:
    """|theta * g|, with g from ``estimator``."""
    found = estimator.estimate(batch)
    values = {name: (estimator.model.get_parameter(name).detach() * g).abs() for name, g in found.grads.items()}
    return Scores(values, found.queries)


class _LayerwiseRGE(EngineEstimator):
    """RGE for every layer apart, from one base pass: m = queries // layers directions that move that layer only.

    A layer is one parameter of two or more dimensions; all vectors and scalars together are one more. Every estimate
    uses the same directions.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, *, queries: int, mu: float, seed: int, precision: str
    ) -> None:
        super().__init__(model, objective, mu=mu, precision=precision)
        names = list(selected(model, None))
        vectors = [name for name in names if model.get_parameter(name).dim() < 2]
        self.layers = [[name] for name in names if name not in vectors] + ([vectors] if vectors else [])
        if not isinstance(queries, int) or queries < len(self.layers):
            raise ValueError(
                f"queries must be at least one direction for each of the model's {len(self.layers)} layers, got "
                f"{queries!r}"
            )
        self.parts = [
            RGE(model, objective, queries=queries // len(self.layers), mu=mu, seed=seed, precision=precision)
            for _ in self.layers
        ]
        for number, part in enumerate(self.parts):
            part.engine = self.engine
            part.estimates = number  # directions of its own

    def _count(self, selected: dict[str, Tensor]) -> int:
        return 1 + sum(part.directions.count for part in self.parts)

    def _gradients(self, ready: Prepared, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        grads: dict[str, Tensor] = {}
        for part, names in zip(self.parts, self.layers, strict=True):
            grads |= part._gradients(ready, {name: selected[name] for name in names})
        return {name: grads[name] for name in selected}

    def square_unbiased(self, scores: Scores) -> Scores:
        """Scores times sqrt(m / (m + d_l + 1)): m Gaussian directions in d_l dimensions inflate squares by the rest."""
        values = dict(scores.values)
        for part, names in zip(self.parts, self.layers, strict=True):
            m, d = part.directions.count, sum(values[name].numel() for name in names)
            for name in names:
                values[name] = values[name] * math.sqrt(m / (m + d + 1))
        return Scores(values, scores.queries)


def synflow_network(model: nn.Module, batch: Any) -> tuple[nn.Module, Tensor]:
    """The network of absolute weights, and its input of ones: what SynFlow's R is taken of.

    A float64 copy in evaluation mode whose floating parameters and buffers are replaced by their absolute values. The
    input [1, ...] has the shape of one sample of the first floating tensor in ``batch``, with which the model is called
    as ``model(input)``. Raises ObjectiveError for a batch without one.
    """
    inputs = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not inputs or inputs[0].dim() == 0:
        raise ObjectiveError(
            "SynFlow feeds ones to the model in the place of the batch's first floating-point tensor [n, ...], and "
            "this batch has none. Use another score for models of integer inputs."
        )
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for value in [*twin.parameters(), *twin.buffers()]:
            if value.is_floating_point():
                value.abs_()
    return twin, inputs[0].new_ones((1, *inputs[0].shape[1:]), dtype=torch.float64)


def synaptic_flow(model: nn.Module, ones: Tensor) -> Tensor:
    """R: the sum of the network's outputs."""
    outputs = [leaf for leaf in pytree.tree_leaves(model(ones)) if isinstance(leaf, Tensor)]
    return torch.stack([leaf.sum() for leaf in outputs if leaf.is_floating_point()]).sum()
