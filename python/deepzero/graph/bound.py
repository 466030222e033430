"""Objective, model and batch as one module of tensors, which can be exported and whose parameters can be swapped."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..objective import Objective


class Bound(nn.Module):
    """``objective(model, batch)`` as a module of the batch's tensor leaves, so that it can be exported and swapped.

    others  modules that the objective closes over: their buffers move as the model's own do
    """

    def __init__(self, model: nn.Module, objective: Objective, batch: Any, others: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.model = model
        self.others = nn.ModuleList(others)
        self.training = model.training
        self._hidden = (objective,)  # in a tuple: an objective that is itself a module must not become a child
        self._leaves, self._spec = pytree.tree_flatten(batch)
        self._where = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]

    @property
    def objective(self) -> Objective:
        return self._hidden[0]

    @property
    def tensors(self) -> list[Tensor]:
        """The batch's tensors, which a call may write: hand it :meth:`copies`."""
        return [self._leaves[i] for i in self._where]

    def copies(self) -> tuple[Tensor, ...]:
        return tuple(tensor.detach().clone() for tensor in self.tensors)

    def call(self, values: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """The result with parameters and buffers replaced by ``values``, named as this module's; writes to buffers land
        in ``values``. TorchScript modules cannot have theirs swapped: a copy of the model takes the values."""
        if not any(isinstance(module, torch.jit.ScriptModule) for module in self.model.modules()):
            return torch.func.functional_call(self, dict(values), tuple(tensors))
        twin = copy.deepcopy(self.model)
        given = {name.removeprefix("model."): v for name, v in values.items() if name.startswith("model.")}
        if any(v.dtype is torch.float64 for name, v in given.items() if v.is_floating_point()):
            twin.double()
        with torch.no_grad():
            slots = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
            for name, value in given.items():
                slots[name].copy_(value)
            result = self.objective(twin, self._batch(tensors))
            for name, buffer in twin.named_buffers():
                if name in given:
                    given[name].copy_(buffer)
        return result

    def _batch(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self._leaves)
        for i, tensor in zip(self._where, tensors, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, self._spec)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.objective(self.model, self._batch(tensors))
