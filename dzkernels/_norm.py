"""What a kernel knows of a layer norm that it takes over."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowNorm(NamedTuple):
    """The layer norm of rows, as in :func:`layer_norm_difference`.

    zc     [R, M]       base input minus its mean over the row
    var    [R] float64  mean(zc^2) of the row
    gamma  [M]          weight, None means 1
    eps    added to the variance
    """

    zc: Tensor
    var: Tensor
    gamma: Tensor | None
    eps: float
