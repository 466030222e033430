from __future__ import annotations

from torch import Tensor

from ._conv2d import convolve
from .dense_batch_norm import channels_last

Size = tuple[int, int]


def run(
    delta: Tensor, weight: Tensor, *, stride: Size, padding: Size, dilation: Size, groups: int,
    next_zc: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    return convolve(
        __name__, channels_last(delta), weight, next_zc, stride=stride, padding=padding, dilation=dilation,
        groups=groups,
    )  # fmt: skip
