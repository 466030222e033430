"""Coordinate-wise gradient estimation the plain way: perturb one weight, run the whole model, restore the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StepError
from ..estimators.interface import Estimate, Estimator, StepResult, accumulate
from ..estimators.options import check_mu, check_scheme
from ..objective import Mask, Objective, check_loss, selected
from .transaction import Snapshot, Transaction


class PlainLoop(Estimator):
    """One full forward per perturbed coordinate: the reference method, in the model's own precision.

    With forward differences the estimate of coordinate i is ``(L(w + h e_i) - L(w)) / h`` (paper, equation of CGE),
    with central ones ``(L(w + h e_i) - L(w - h e_i)) / 2h``; because the weight is really written, h is the realised
    step ``fl(w + mu) - w``, not mu. Every query starts from the same buffers and the same random state. Queries:
    n + 1 (forward) or 2n + 1 (central) for n coordinates.

    Raises StepError for a mu that is not positive and finite or that vanishes when added to a weight, ObjectiveError
    for a loss that is not one finite number, MaskError for a mask that does not fit, BudgetError before overspending.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        mu: float = 5e-3,
        scheme: str = "forward",
        budget: int | None = None,
    ) -> None:
        self.model, self.objective = model, objective
        self.mu, self.scheme = check_mu(mu), check_scheme(scheme)
        self.queries, self.budget = 0, budget

    def estimate(self, batch: Any, mask: Mask | None = None) -> Estimate:
        with Transaction(self.model) as transaction:
            estimate, _ = self._differences(transaction, batch, mask)
            self._done(estimate.queries)
        return estimate

    def backward(self, batch: Any, mask: Mask | None = None) -> StepResult:
        with Transaction(self.model) as transaction:
            estimate, after_base = self._differences(transaction, batch, mask)
            transaction.settle()
            accumulate(self.model, estimate.grads)
            self._done(estimate.queries)
            transaction.keep(after_base)
        return StepResult(estimate.loss, estimate.queries)

    @torch.no_grad()
    def _differences(self, transaction: Transaction, batch: Any, mask: Mask | None) -> tuple[Estimate, Snapshot]:
        chosen = selected(self.model, mask)
        coordinates = sum(int(m.sum()) for m in chosen.values())
        queries = (1 if self.scheme == "forward" else 2) * coordinates + 1
        self._spend(queries)
        base = transaction.call(lambda: check_loss(self.objective(self.model, batch)))
        after_base = Snapshot(self.model)
        parameters = dict(self.model.named_parameters())
        grads = {}
        for name, selection in chosen.items():
            parameter = parameters[name]
            grads[name] = torch.zeros_like(parameter)
            for index in map(tuple, selection.nonzero().tolist()):
                up, ahead = self._query(transaction, batch, name, parameter, index, self.mu)
                down, behind = (
                    (base, 0.0)
                    if self.scheme == "forward"
                    else self._query(transaction, batch, name, parameter, index, -self.mu)
                )
                grads[name][index] = (up - down) / (ahead - behind)
        return Estimate(base, grads, queries), after_base

    def _query(
        self, transaction: Transaction, batch: Any, name: str, parameter: Tensor, index: tuple[int, ...], step: float
    ) -> tuple[float, float]:
        """Loss with one weight moved by ``step``, and the step that its rounding left."""
        transaction.start.restore()
        weight = float(parameter[index])
        transaction.move(parameter, index, parameter[index] + step)
        realised = float(parameter[index]) - weight
        if realised == 0.0:
            raise StepError(
                f"the step {step:g} vanishes when added to {name}{list(index)} = {weight:g} in {parameter.dtype}. Use "
                "a larger mu, or keep the weights in a wider dtype."
            )
        loss = transaction.call(
            lambda: check_loss(self.objective(self.model, batch), f"with {name}{list(index)} moved by {step:g}")
        )
        transaction.put_back()
        return loss, realised
