"""Forward gradients: the directional derivatives that random gradient estimation approximates, without quotients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ObjectiveError
from ..estimators.directions import Directions
from ..estimators.interface import Estimate, Estimator, StepResult, accumulate
from ..graph.bound import Bound
from ..objective import Mask, Objective, check_loss, selected
from .transaction import Snapshot, Transaction


@contextlib.contextmanager
def _dual_level() -> Iterator[None]:
    """As ``forward_ad.dual_level``. That one counts twice, and Ctrl-C between the two counts leaves them apart: the
    process could enter no other level."""
    before = forward_ad._current_level
    try:
        with forward_ad.dual_level():
            yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # it has been left already
            torch._C._exit_dual_level(level=before + 1)
        forward_ad._current_level = before
        raise


class ForwardGE(Estimator):
    """Forward gradient (Baydin et al. 2022, arXiv 2202.08587): what RGE is without truncation and rounding.

    g = (1/q) sum_i (grad L(w) . u_i) u_i

    The slopes come from forward-mode automatic differentiation, in the model's own precision; the directions are those
    of :class:`deepzero.RGE` with the same ``queries``, ``distribution`` and ``seed``, so that the two can be compared
    estimate by estimate. It needs derivatives, which zeroth-order training is there to do without: hence a baseline.
    One query a direction: each gives the loss too.

    Raises ValueError as RGE does for its directions, ObjectiveError for an op without a forward derivative and a loss
    that is not one finite number, MaskError for a mask that does not fit, BudgetError before overspending.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        queries: int = 192,
        distribution: str = "gaussian",
        seed: int = 0,
        budget: int | None = None,
    ) -> None:
        self.model, self.objective = model, objective
        self.queries, self.budget = 0, budget
        self.directions = Directions(queries, distribution, seed)

    def estimate(self, batch: Any, mask: Mask | None = None) -> Estimate:
        with Transaction(self.model) as transaction:
            estimate, _ = self._gradients(transaction, batch, mask)
            self._done(estimate.queries)
        return estimate

    def backward(self, batch: Any, mask: Mask | None = None) -> StepResult:
        with Transaction(self.model) as transaction:
            estimate, after_first = self._gradients(transaction, batch, mask)
            transaction.settle()
            accumulate(self.model, estimate.grads)
            self._done(estimate.queries)
            transaction.keep(after_first)
        return StepResult(estimate.loss, estimate.queries)

    def _gradients(self, transaction: Transaction, batch: Any, mask: Mask | None) -> tuple[Estimate, Snapshot]:
        chosen = selected(self.model, mask)
        sizes = [int(m.sum()) for m in chosen.values()]
        self.directions.check(sum(sizes))
        self._spend(self.directions.count)
        device = self.model.get_parameter(next(iter(chosen))).device
        bound = Bound(self.model, self.objective, batch)
        total = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        after_first = transaction.start
        for number, drawn in enumerate(self.directions.draw(len(total), self.estimates)):
            transaction.start.restore()
            u = drawn.to(device)
            parts = dict(zip(chosen, u.split(sizes), strict=True))
            slopes: list[float] = []

            def derive(parts: dict[str, Tensor] = parts, slopes: list[float] = slopes) -> float:
                value, slope = self._slope(bound, chosen, parts)
                slopes.append(slope)
                return value

            value = transaction.call(derive)
            if number == 0:
                loss, after_first = value, Snapshot(self.model)
            total += slopes[0] * u.double()
        total /= self.directions.count
        grads = {}
        for (name, m), part in zip(chosen.items(), total.split(sizes), strict=True):
            parameter = self.model.get_parameter(name)
            grads[name] = torch.zeros_like(parameter, requires_grad=False).masked_scatter_(m, part.to(parameter.dtype))
        return Estimate(loss, grads, self.directions.count), after_first

    def _slope(self, bound: Bound, chosen: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> tuple[float, float]:
        """The loss, and its derivative along the direction ``parts`` of the chosen coordinates."""
        # fused attention has no forward derivative; its plain form has
        with torch.no_grad(), _dual_level(), sdpa_kernel(SDPBackend.MATH):
            moving = {}
            for name, part in parts.items():
                weight = self.model.get_parameter(name).detach()
                tangent = torch.zeros_like(weight).masked_scatter_(chosen[name], part.to(weight.dtype))
                moving[f"model.{name}"] = forward_ad.make_dual(weight, tangent)
            try:
                result = torch.func.functional_call(bound, moving, tuple(bound.tensors))
            except NotImplementedError as missing:
                raise ObjectiveError(
                    f"the model or the objective has an op without a forward-mode derivative ({missing}). dz.RGE needs "
                    "none."
                ) from missing
            value = check_loss(result)
            tangent_of_loss = forward_ad.unpack_dual(result).tangent
            return value, 0.0 if tangent_of_loss is None else float(tangent_of_loss)
