"""The same scores by backpropagation: the ceiling that zeroth-order scores are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..graph.bound import Bound
from ..objective import Objective, check_loss, selected
from ..state import cloned_buffers, random_state_kept
from .scores import Scores, synaptic_flow, synflow_network


def grasp(model: nn.Module, objective: Objective, batch: Any) -> Scores:
    """GraSP (Wang et al., ICLR 2020): S = -theta * (H g), by two backward passes in the model's own dtypes.

    Needs an objective that autograd can differentiate twice. The gradient of a coordinate that the loss does not
    depend on counts as 0.
    """
    leaves, loss = _loss(model, objective, batch)
    grads = _grad(loss, leaves, create_graph=True)
    norm = torch.stack([(g * g.detach()).sum() for g in grads.values()]).sum()
    products = _grad(norm, leaves) if norm.requires_grad else {name: torch.zeros_like(p) for name, p in leaves.items()}
    return Scores({name: -p.detach() * products[name] for name, p in leaves.items()}, 1)


def snip(model: nn.Module, objective: Objective, batch: Any) -> Scores:
    """SNIP (Lee et al., ICLR 2019): |theta * g|."""
    leaves, loss = _loss(model, objective, batch)
    return Scores({name: (leaves[name].detach() * g).abs() for name, g in _grad(loss, leaves).items()}, 1)


def synflow(model: nn.Module, objective: Any, batch: Any) -> Scores:
    """SynFlow (Tanaka et al., NeurIPS 2020), one round: |theta * dR/dtheta|; see :func:`synflow_network`."""
    twin, ones = synflow_network(model, batch)
    return snip(twin, synaptic_flow, ones)


def _loss(model: nn.Module, objective: Objective, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Detached copies of the trainable parameters and the loss as a function of them; the model is only read."""
    leaves = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in selected(model, None)}
    bound = Bound(model, objective, batch)
    named = {f"model.{name}": value for name, value in {**cloned_buffers(model), **leaves}.items()}
    with random_state_kept(), torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = torch.func.functional_call(bound, named, tuple(bound.tensors))
    check_loss(loss)
    return leaves, loss.reshape(())


def _grad(value: Tensor, leaves: dict[str, Tensor], *, create_graph: bool = False) -> dict[str, Tensor]:
    grads = torch.autograd.grad(
        value, list(leaves.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, grads, strict=True))
