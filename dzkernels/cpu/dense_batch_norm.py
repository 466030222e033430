from __future__ import annotations

import torch
from torch import Tensor

from .._load import native

_HALVES = (torch.float32, torch.bfloat16)


def dense_batch_norm(
    delta: Tensor, zc: Tensor, var: Tensor, gamma: Tensor, *, eps: float, training: bool, residual: Tensor | None,
    residual_channel: Tensor | None, y: Tensor | None, pool: int, gap: Tensor | None, out_dtype: torch.dtype,
    moments: Tensor | None,
) -> Tensor:  # fmt: skip
    # moments are taken anew: the second pass reads from cache what the first one read
    delta, zc, var, gamma = _last(delta), _last(zc), var.contiguous(), gamma.contiguous()
    if residual is not None:
        residual = _last(residual) if residual_channel is None else residual.contiguous()
        if residual.dtype not in _HALVES:
            residual = residual.float()
    if residual_channel is not None:
        residual_channel = residual_channel.contiguous()
    y, gap = _last(y) if y is not None else None, _last(gap) if gap is not None else None
    inner = out_dtype if out_dtype in _HALVES else torch.float32
    perturbations, samples, height, width, channels = delta.shape
    out = torch.empty(perturbations, samples, height // pool, width // pool, channels, dtype=inner, device="cpu")
    native().dense_batch_norm(
        delta.data_ptr(), zc.data_ptr(), var.data_ptr(), gamma.data_ptr(), _address(residual),
        _address(residual_channel), _address(y), _address(gap), out.data_ptr(), eps, *delta.shape, pool, training,
        delta.dtype == torch.bfloat16, residual is not None and residual.dtype == torch.bfloat16,
        inner == torch.bfloat16,
    )  # fmt: skip
    return out.to(out_dtype).permute(0, 1, 4, 2, 3)


def _last(values: Tensor) -> Tensor:
    """[..., C, H, W] as contiguous [..., H, W, C]; no copy where it lies so already."""
    return values.movedim(-3, -1).contiguous()


def _address(values: Tensor | None) -> int:
    return values.data_ptr() if values is not None else 0
