"""Which coordinates a mask selects, checked against the model before any work starts."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor, nn

from ..errors import MaskError
from ..estimators.base import Mask


def selected(model: nn.Module, mask: Mask | None) -> dict[str, Tensor]:
    """Parameter name -> bool tensor of the parameter's shape and device, for parameters with a selected coordinate.

    ``mask=None`` selects every parameter with requires_grad. Raises MaskError on unknown names, wrong dtypes or
    shapes, frozen parameters, and on a mask that selects nothing.
    """
    parameters = dict(model.named_parameters())
    if mask is None:
        chosen = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items() if p.requires_grad}
    else:
        chosen = {name: _checked(name, m, parameters) for name, m in mask.items()}
    chosen = {name: m for name, m in chosen.items() if bool(m.any())}
    if not chosen:
        raise MaskError(
            "the mask selects no coordinate, so there is nothing to estimate. Mark at least one coordinate True, or "
            "pass mask=None for every parameter with requires_grad (is every parameter frozen?)."
        )
    return chosen


def _checked(name: str, mask: Tensor, parameters: dict[str, nn.Parameter]) -> Tensor:
    if name not in parameters:
        near = difflib.get_close_matches(name, parameters, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise MaskError(f"the mask names {name!r}, which is no parameter of the model.{hint}")
    parameter = parameters[name]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise MaskError(
            f"mask[{name!r}] must be a torch.bool tensor, got {came}. Use mask.bool() or scores > threshold."
        )
    if mask.shape != parameter.shape:
        raise MaskError(
            f"mask[{name!r}] must have the parameter's shape {tuple(parameter.shape)}, got {tuple(mask.shape)}"
        )
    if not parameter.requires_grad and bool(mask.any()):
        raise MaskError(
            f"mask[{name!r}] selects coordinates of a frozen parameter. Set requires_grad_(True) or drop it."
        )
    return mask.to(parameter.device)
