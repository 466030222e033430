"""How much each coordinate matters, from function values alone: ZO-GraSP (Chen et al., ICLR 2024) and its siblings.

Every score is one function ``(model, objective, batch, *, ...) -> Scores``. It reads the model and leaves weights,
buffers, modes, ``.grad`` and random state as they are; random directions follow from ``seed`` alone.

A score here is one of three measures (GraSP, SNIP, SynFlow) taken of an estimator's gradients, whose options it takes.
Three estimators sample the gradient and Hessian-gradient product, told apart by the end of the name:

``zo_grasp``            RGE over all coordinates, as published. With far fewer directions q than coordinates d its noise
                        is the same in every layer and larger than the signal by sqrt(d / q).
``zo_grasp_layerwise``  each direction moves one layer only, so that the same budget measures what differs between them.
``zo_grasp_cge``        one difference a coordinate: exact up to the step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..errors import ObjectiveError
from ..estimators import CGE, RGE, EngineEstimator, LayerwiseRGE
from ..estimators.options import Options, RandomOptions, spelled_out
from ..objective import Objective

if TYPE_CHECKING:
    from typing_extensions import Unpack

Score = TypeVar("Score", bound=Callable[..., Any])


@dataclass(frozen=True)
class Scores:
    """A score for every coordinate that may be trained.

    values   parameter name -> tensor of that parameter's shape and device, floating point
    queries  loss values spent, base losses included; 0 for scores that never evaluate the objective
    """

    values: Mapping[str, Tensor]
    queries: int = 0


def options_of(estimator: type[EngineEstimator], *, but: Collection[str] = ()) -> Callable[[Score], Score]:
    """A score that hands ``**options`` to an estimator shows them in its signature, where configurations look."""

    def spelled(score: Score) -> Score:
        signature = spelled_out(score, estimator)
        kept = [p for name, p in signature.parameters.items() if name not in but]
        score.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return score

    return spelled


@options_of(RGE)
def zo_grasp(model: nn.Module, objective: Objective, batch: Any, **options: Unpack[RandomOptions]) -> Scores:
    """ZO-GraSP as published (Chen et al., ICLR 2024, section 4): S = -theta * (g(theta + mu g) - g(theta)) / mu.

    g is RGE with ``queries`` Gaussian directions, the same ones in both estimates and unbiased in scale, so that S is
    an unbiased sample of -theta * (H g) for the smoothed loss up to O(mu) and the noise of g itself. Spends
    2 (queries + 1) loss values. Options and errors are those of :class:`RGE`.
    """
    return _grasp(RGE(model, objective, **options), batch)


@options_of(LayerwiseRGE)
def zo_grasp_layerwise(model: nn.Module, objective: Objective, batch: Any, **options: Any) -> Scores:
    """ZO-GraSP whose ``queries`` directions measure what layer-wise ratios depend on: the layers' differences.

    Layer l gets m = queries // layers Gaussian directions u_lk that move it alone (:class:`LayerwiseRGE`). At theta
    they give the gradient's part g_l = (1/m) sum_k (g . u_lk) u_lk; the same directions at theta + mu g give
    u_lk . H g, hence

        S_l = -theta_l * (1/m) sum_k (u_lk . H g) u_lk * sqrt(m / (m + d_l + 1)).

    The last factor takes out what the noise of m directions in d_l dimensions adds to the second moment: the mean
    square of (H g)_l, which decides the layer's share of the coordinates, is unbiased. RGE over all coordinates spreads
    one noise level over all layers instead. Spends 2 (m layers + 1) loss values, no more than :func:`zo_grasp`.
    Options and errors are those of :class:`LayerwiseRGE`.
    """
    estimator = LayerwiseRGE(model, objective, **options)
    return _square_unbiased(estimator, _grasp(estimator, batch))


@options_of(CGE)
def zo_grasp_cge(model: nn.Module, objective: Objective, batch: Any, **options: Unpack[Options]) -> Scores:
    """S = -theta * (g(theta + mu g) - g(theta)) / mu with coordinate-wise g: exact up to the step, 2 (d + 1) losses."""
    return _grasp(CGE(model, objective, **options), batch)


@options_of(RGE)
def zo_snip(model: nn.Module, objective: Objective, batch: Any, **options: Unpack[RandomOptions]) -> Scores:
    """SNIP's |theta * g| (Lee et al., ICLR 2019) with g by RGE; ``queries`` + 1 loss values."""
    return _snip(RGE(model, objective, **options), batch)


@options_of(LayerwiseRGE)
def zo_snip_layerwise(model: nn.Module, objective: Objective, batch: Any, **options: Any) -> Scores:
    """SNIP's |theta * g| with directions that move one layer each, as in :func:`zo_grasp_layerwise`.

    The mean square of g in every layer is unbiased; at most ``queries`` + 1 loss values.
    """
    estimator = LayerwiseRGE(model, objective, **options)
    return _square_unbiased(estimator, _snip(estimator, batch))


@options_of(CGE)
def zo_snip_cge(model: nn.Module, objective: Objective, batch: Any, **options: Unpack[Options]) -> Scores:
    """SNIP's |theta * g| with coordinate-wise g; d + 1 loss values."""
    return _snip(CGE(model, objective, **options), batch)


@options_of(RGE, but=("precision",))
def zo_synflow(model: nn.Module, objective: Any, batch: Any, **options: Any) -> Scores:
    """SynFlow's |theta * dR/dtheta| (Tanaka et al., NeurIPS 2020), one round, with RGE; see :func:`synflow_network`.

    ``queries`` + 1 values of R in float64; ``objective`` is not evaluated.
    """
    twin, ones = synflow_network(model, batch)
    return _snip(RGE(twin, synaptic_flow, precision="float64", **options), ones)


@options_of(CGE, but=("precision",))
def zo_synflow_cge(model: nn.Module, objective: Any, batch: Any, **options: Any) -> Scores:
    """SynFlow's |theta * dR/dtheta| with coordinate-wise differences, which R, linear in each weight, makes exact."""
    twin, ones = synflow_network(model, batch)
    return _snip(CGE(twin, synaptic_flow, precision="float64", **options), ones)


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


def _square_unbiased(estimator: LayerwiseRGE, scores: Scores) -> Scores:
    """Scores times sqrt(m / (m + d_l + 1)): m Gaussian directions in d_l dimensions inflate squares by the rest."""
    values, m = dict(scores.values), estimator.directions.count
    for names in estimator.layers:
        d = sum(values[name].numel() for name in names)
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
