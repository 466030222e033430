from __future__ import annotations

import torch
from torch import Tensor

from . import is_half, kernel_dtype, launch


def run(
    delta: Tensor, zc: Tensor, var: Tensor, gamma: Tensor, *, eps: float, training: bool, residual: Tensor | None,
    residual_channel: Tensor | None, y: Tensor | None, pool: int, gap: Tensor | None, out_dtype: torch.dtype,
    moments: Tensor | None,
) -> Tensor:  # fmt: skip
    # given moments are ignored: computing them costs little, as the second pass reads the same values from cache
    delta, zc, var, gamma = _last(delta), _last(zc), var.contiguous(), gamma.contiguous()
    if residual is not None:
        residual = _last(residual) if residual_channel is None else residual.contiguous()
        residual = residual.to(kernel_dtype(residual.dtype))
    if residual_channel is not None:
        residual_channel = residual_channel.contiguous()
    y, gap = _last(y) if y is not None else None, _last(gap) if gap is not None else None
    perturbations, samples, height, width, channels = delta.shape
    out = torch.empty(
        perturbations, samples, height // pool, width // pool, channels, dtype=kernel_dtype(out_dtype), device="cpu"
    )
    launch(
        __name__, delta, zc, var, gamma, residual, residual_channel, y, gap, out, eps, *delta.shape, pool,
        training, is_half(delta), is_half(residual), is_half(out),
    )  # fmt: skip
    return out.to(out_dtype).permute(0, 1, 4, 2, 3)


def _last(values: Tensor) -> Tensor:
    """[..., C, H, W] as contiguous [..., H, W, C]; no copy if it is already laid out so."""
    return values.movedim(-3, -1).contiguous()
