"""Coordinate-wise estimation that remembers: coordinates outside of a step's mask keep their last quotient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..evaluator import Evaluator
from ..objective import Objective
from .cge import CGE
from .options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StaleGE(CGE):
    """CGE with a buffer of stale gradients (Coherent Coordinate Descent, Liang et al., ICML 2026, arXiv 2605.14373).

    g_i = (L(w + mu e_i) - L(w)) / mu    for the coordinates of the mask, as :class:`CGE`
    g_i = decay * last g_i               for the others, 0 before their first turn

    What the paper does with a cyclic schedule happens here with the masks of the training loop, of any policy: queries
    are those of the mask, the gradient is one of all weights. The buffer takes on each gradient that ``backward`` has
    added to ``.grad``; ``estimate`` reads it and changes nothing. It is part of ``state_dict``.

    decay  factor for a stale value, once a step: 1 keeps the whole history, 0 is CGE with its mask (block coordinate
           descent)

    Gradients are returned for every trainable parameter that was ever in a mask. Other arguments and errors as in
    :class:`EngineEstimator`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        decay: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, objective, **options)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be between 0 (forget at once) and 1 (never), got {decay!r}")
        self.decay = float(decay)
        self.buffer: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"buffer": dict(self.buffer)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError for a buffer of another model."""
        parameters = dict(self.model.named_parameters())
        for name, value in state["buffer"].items():
            if name not in parameters or parameters[name].shape != value.shape:
                has = f"shape {list(parameters[name].shape)}" if name in parameters else "no such parameter"
                raise CheckpointError(
                    f"the saved stale gradient of {name!r} has shape {list(value.shape)}, the model has {has}: the "
                    "checkpoint is of another model."
                )
        super().load_state_dict(state)
        self.buffer = {name: value.to(parameters[name].device, copy=True) for name, value in state["buffer"].items()}

    def gradients(self, evaluator: Evaluator, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        fresh = super().gradients(evaluator, selected)
        grads = {}
        for name, parameter in self.model.named_parameters():
            if name in self.buffer and parameter.requires_grad:
                grads[name] = self.decay * self.buffer[name]
                if name in fresh:
                    at = tuple(selected[name].unbind(1))
                    grads[name][at] = fresh[name][at]
            elif name in fresh:
                grads[name] = fresh[name]
        return grads

    def remember(self, grads: dict[str, Tensor]) -> None:
        self.buffer = {name: grad.clone() for name, grad in grads.items()}
