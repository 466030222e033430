"""An optimizer's step that leaves alone what the mask left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import MaskError
from ..objective import Mask


@torch.no_grad()
def masked_step(optimizer: Optimizer, model: nn.Module, mask: Mask) -> None:
    """``optimizer.step()``, after which weights and state outside ``mask`` have the bits they had before.

    An ordinary step moves them too: momentum goes on from earlier steps, and weight decay pulls at every weight. State
    that this step creates is there what a weight and a gradient of zero give it; gradients outside ``mask`` are set to
    zero. What an optimizer keeps per tensor, such as Adam's number of steps, goes on. Parameters absent from ``mask``
    are outside it; the optimizer's parameters that are not ``model``'s take an ordinary step.

    Raises MaskError when the optimizer keeps state that belongs to no single coordinate, as Adafactor does.
    """
    masks = {parameter: mask.get(name) for name, parameter in model.named_parameters()}
    held: list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None or parameter not in masks:
                continue
            active = masks[parameter]
            outside = torch.ones_like(parameter, dtype=torch.bool) if active is None else ~active.to(parameter.device)
            if bool(outside.any()):
                kept = {name: value.clone() for name, value in _by_coordinate(optimizer, parameter).items()}
                held.append((parameter, outside, parameter.clone(), kept))
                parameter.grad.masked_fill_(outside, 0)
                parameter.masked_fill_(outside, 0)  # so that weight decay puts nothing into new state
    try:
        optimizer.step()
        states = [_by_coordinate(optimizer, parameter) for parameter, *_ in held]
    except BaseException:
        for parameter, _, before, _ in held:
            parameter.copy_(before)
        raise
    for (parameter, outside, before, kept), state in zip(held, states, strict=True):
        parameter.copy_(torch.where(outside, before, parameter))
        for name, value in kept.items():
            state[name].copy_(torch.where(outside, value, state[name]))


def _by_coordinate(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state of ``parameter`` that has an entry for each coordinate."""
    found = {}
    for name, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor):
            continue
        if value.shape == parameter.shape:
            found[name] = value
        elif value.numel() > 1:
            raise MaskError(
                f"{type(optimizer).__name__} keeps {name} of shape {list(value.shape)} for a parameter of shape "
                f"{list(parameter.shape)}: its coordinates cannot be held still one by one. Use momentum = 'dense', or "
                "an optimizer with state by coordinate, such as SGD or Adam."
            )
    return found
