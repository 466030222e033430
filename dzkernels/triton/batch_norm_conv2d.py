from __future__ import annotations

from torch import Tensor

from ._conv2d import convolve
from .dense_batch_norm import channels_last, coefficients_of, kind_of_residual

Size = tuple[int, int]


def run(
    delta: Tensor, zc: Tensor, var: Tensor, gamma: Tensor, weight: Tensor, *, eps: float, training: bool,
    residual: Tensor | None, residual_channel: Tensor | None, y: Tensor | None, moments: Tensor | None, stride: Size,
    padding: Size, dilation: Size, next_zc: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    delta, zc, y = channels_last(delta), channels_last(zc), channels_last(y) if y is not None else None
    kind, residual, residual_channel = kind_of_residual(residual, residual_channel)
    coefficients = coefficients_of(delta, zc, var.contiguous(), gamma.contiguous(), eps, training, moments)
    norm = {"zc": zc, "coefficients": coefficients, "residual": residual, "residual_channel": residual_channel, "y": y}
    return convolve(
        __name__, delta, weight, next_zc, stride=stride, padding=padding, dilation=dilation,
        norm=norm | {"TRAINING": training, "RESIDUAL": kind},
    )  # fmt: skip
