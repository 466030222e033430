"""What users hand in: the objective and the mask, and the checks of both before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DeviceError, MaskError, ObjectiveError, did_you_mean

Objective = Callable[[nn.Module, Any], Tensor]
"""``objective(model, batch)`` returns the loss: a tensor with one element. ``batch`` is any pytree of tensors."""

Mask = Mapping[str, Tensor]
"""Parameter name -> bool tensor of that parameter's shape; True marks a coordinate to estimate. Absent: skipped."""


def check_loss(loss: Any, where: str = "before any perturbation") -> float:
    """The objective's result as a float. Raises :class:`ObjectiveError` unless it is one finite real number."""
    if not isinstance(loss, Tensor):
        raise ObjectiveError(
            f"objective(model, batch) must return a tensor with one element, got {type(loss).__name__}. "
            "Return the loss itself, for example torch.nn.functional.cross_entropy(model(x), y)."
        )
    if loss.numel() != 1:
        raise ObjectiveError(
            f"objective(model, batch) must return one number, got a tensor of shape {list(loss.shape)}. "
            "Reduce it, for example with .mean()."
        )
    if loss.is_complex():
        raise ObjectiveError(f"objective(model, batch) must return a real number, got dtype {loss.dtype}.")
    return check_finite(float(loss.detach()), where)


def check_finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise ObjectiveError(
            f"the loss is {value} {where}, so no difference of it means anything. "
            "Check the batch and the weights for nan/inf, or lower the learning rate or mu."
        )
    return value


def check_parameters(model: nn.Module) -> None:
    """Raise :class:`DeviceError` for parameters without values, :class:`MaskError` for complex ones to be trained."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise DeviceError(
                f"the parameter {name!r} is on the meta device and has no values. Give the model some first: "
                "model.to_empty(device=...) and its own initialisation or load_state_dict."
            )
        if parameter.is_complex() and parameter.requires_grad:
            raise MaskError(
                f"the parameter {name!r} has dtype {parameter.dtype}, and a coordinate is one real number. Keep its "
                "real and imaginary parts as a real parameter of shape [..., 2] and use torch.view_as_complex in "
                "forward, or call .requires_grad_(False) on it."
            )


def selected(model: nn.Module, mask: Mask | None) -> dict[str, Tensor]:
    """Parameter name -> bool tensor of its shape and device, for parameters with at least one selected coordinate.

    ``mask=None`` selects every parameter that requires grad. Raises :class:`MaskError` for unknown names, wrong
    dtypes or shapes, frozen parameters, second names of a tied tensor, and a mask that selects nothing.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if mask is not None and not isinstance(mask, Mapping):
        raise MaskError(f"a mask is a dict of parameter name -> bool tensor, got {type(mask).__name__}.")
    if mask is None:
        chosen = {name: torch.ones_like(p, dtype=torch.bool) for name, p in trainable.items()}
    else:
        every = dict(model.named_parameters(remove_duplicate=False))
        for name, m in mask.items():
            _check(name, m, every, trainable)
        chosen = {name: mask[name].to(p.device) for name, p in trainable.items() if name in mask}
    chosen = {name: m for name, m in chosen.items() if bool(m.any())}
    if chosen:
        return chosen
    raise MaskError(
        "the model has no parameter that requires grad, so there is nothing to estimate."
        if mask is None
        else "the mask selects no coordinate: no query would be made and the gradient would be zero. "
        "Select at least one, or pass mask=None for every parameter."
    )


def _check(name: str, mask: Any, every: dict[str, nn.Parameter], trainable: dict[str, nn.Parameter]) -> None:
    if name not in every:
        hint = did_you_mean(str(name), trainable, f"Parameters are: {_some(sorted(trainable))}.")
        raise MaskError(f"the mask names {name!r}, which is no parameter of the model.{hint}")
    if name not in trainable:
        twin = next((n for n, p in trainable.items() if p is every[name]), None)
        hint = (
            f"it is the same tensor as {twin!r}: mask that name"
            if twin
            else "it does not require grad: call .requires_grad_(True) on it or leave it out"
        )
        raise MaskError(f"the mask names {name!r}, which cannot be estimated: {hint}.")
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise MaskError(f"mask[{name!r}] must be a bool tensor, got {got}. Use .bool(), or scores > threshold.")
    if mask.shape != trainable[name].shape:
        raise MaskError(
            f"mask[{name!r}] must have the parameter's shape {list(trainable[name].shape)}, got {list(mask.shape)}."
        )


def _some(names: list[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"
