"""The one interface of every gradient estimator.

``estimate`` is pure: it returns gradients and touches nothing. ``backward`` is its twin for training loops: it adds
to ``p.grad`` as ``loss.backward()`` would, and leaves random state and buffers as one ordinary forward pass would.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BudgetError
from ..objective import Mask, Objective


@dataclass(frozen=True)
class Estimate:
    """What one call of :meth:`Estimator.estimate` found.

    loss     the unperturbed loss, a float
    grads    parameter name -> gradient estimate, in the parameter's shape, dtype and device; exactly 0 where masked
             out; parameters without any selected coordinate are absent
    queries  perturbed function values this estimate stands for, the base loss included
    """

    loss: float
    grads: dict[str, Tensor]
    queries: int


@dataclass(frozen=True)
class StepResult:
    """What one call of :meth:`Estimator.backward` reports: the unperturbed loss and the queries spent."""

    loss: float
    queries: int


class Estimator(ABC):
    """Estimates the gradient of ``objective(model, batch)`` with respect to the model's parameters.

    queries    total spent by this estimator so far
    estimates  how many it has made; random directions follow from it and a seed
    budget     most queries this estimator may spend in all, or None; checked before an estimate starts, never overshot
    """

    model: nn.Module
    objective: Objective
    queries: int
    estimates: int = 0
    budget: int | None

    @abstractmethod
    def estimate(self, batch: Any, mask: Mask | None = None) -> Estimate:
        """Return the estimate; weights, buffers, RNG, modes, hooks and ``.grad`` stay as they are."""

    @abstractmethod
    def backward(self, batch: Any, mask: Mask | None = None) -> StepResult:
        """Add the estimate to ``p.grad``; buffers and RNG move as in one ordinary forward pass."""

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors only, so that a checkpoint loads without executing code."""
        return {"queries": self.queries, "estimates": self.estimates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.queries = int(state["queries"])
        self.estimates = int(state.get("estimates", 0))  # older states have it where directions are drawn

    def _done(self, queries: int) -> None:
        """Count an estimate that came through."""
        self.queries += queries
        self.estimates += 1

    def _spend(self, queries: int) -> None:
        """Raise before any work when ``queries`` more would exceed the budget."""
        if self.budget is not None and self.queries + queries > self.budget:
            raise BudgetError(
                f"this estimate needs {queries:,} queries and {self.queries:,} of the budget of {self.budget:,} are "
                f"spent: {self.budget - self.queries:,} are left. Raise budget=, or use a sparser mask."
            )


def accumulate(model: nn.Module, grads: Mapping[str, Tensor]) -> None:
    """Add ``grads`` to ``p.grad``, creating it where it is None, as ``loss.backward()`` does."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, grad in grads.items():
            parameter = parameters[name]
            if parameter.grad is None:
                parameter.grad = grad
            else:
                parameter.grad.add_(grad)
