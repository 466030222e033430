"""Objective, model and batch as one module of tensors, which can be exported and whose parameters can be swapped."""

from __future__ import annotations

from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..objective import Objective


class Bound(nn.Module):
    """``objective(model, batch)`` as a module of the batch's tensor leaves, so that it can be exported and swapped."""

    def __init__(self, model: nn.Module, objective: Objective, batch: Any) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._hidden = (objective,)  # in a tuple: an objective that is itself a module must not become a child
        self._leaves, self._spec = pytree.tree_flatten(batch)
        self._where = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]

    @property
    def objective(self) -> Objective:
        return self._hidden[0]

    @property
    def tensors(self) -> list[Tensor]:
        return [self._leaves[i] for i in self._where]

    def forward(self, *tensors: Tensor) -> Tensor:
        leaves = list(self._leaves)
        for i, tensor in zip(self._where, tensors, strict=True):
            leaves[i] = tensor
        return self.objective(self.model, pytree.tree_unflatten(leaves, self._spec))
