"""First-order gradients behind the estimators' interface, masked exactly as theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..estimators.interface import Estimate, Estimator, StepResult, accumulate
from ..objective import Mask, Objective, check_loss, selected
from .transaction import Snapshot, Transaction


class Backprop(Estimator):
    """Gradients by automatic differentiation: what a zeroth-order run is compared with.

    A call counts as one query, the one function value it needs. Parameters that the loss does not reach get a zero
    gradient, as a zeroth-order estimate would give. Raises as :class:`PlainLoop` does.
    """

    def __init__(self, model: nn.Module, objective: Objective, *, budget: int | None = None) -> None:
        self.model, self.objective = model, objective
        self.queries, self.budget = 0, budget

    def estimate(self, batch: Any, mask: Mask | None = None) -> Estimate:
        with Transaction(self.model) as transaction:
            estimate = self._gradients(transaction, batch, mask)
            self._done(estimate.queries)
        return estimate

    def backward(self, batch: Any, mask: Mask | None = None) -> StepResult:
        with Transaction(self.model) as transaction:
            estimate = self._gradients(transaction, batch, mask)
            transaction.settle()
            accumulate(self.model, estimate.grads)
            self._done(estimate.queries)
            transaction.keep(Snapshot(self.model))
        return StepResult(estimate.loss, estimate.queries)

    def _gradients(self, transaction: Transaction, batch: Any, mask: Mask | None) -> Estimate:
        chosen = selected(self.model, mask)
        self._spend(1)
        parameters = dict(self.model.named_parameters())
        grads: list[Tensor] = []

        def differentiate() -> float:
            with torch.enable_grad():
                loss = self.objective(self.model, batch)
                value = check_loss(loss)
                wanted = [parameters[name] for name in chosen]
                if loss.requires_grad:
                    grads.extend(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
                else:  # nothing differentiable between the weights and the loss
                    grads.extend(torch.zeros_like(p) for p in wanted)
            return value

        value = transaction.call(differentiate)
        masked = {name: torch.where(m, g, 0) for (name, m), g in zip(chosen.items(), grads, strict=True)}
        return Estimate(value, masked, 1)
