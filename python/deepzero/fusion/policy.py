"""Which device wants which fused kernel."""

from __future__ import annotations

import torch

from dzkernels import backends

NORMS_AROUND_CONVOLUTIONS = frozenset({"triton"})
"""Backends whose convolutions take over the norms before and after them. On GPUs that moves fewer values through
memory, by count: no GPU has measured it yet (``benchmarks.convolutions``). On CPUs it was measured and is slower."""

L2_VALUES = 1 << 18
"""The largest weight matrix, or packed keys and values of a sample, that fused linear layers and attention take: the
kernels run through it again and again, and it has to stay in a cache."""

STRIP = 64
"""Output channels of one program of Triton's convolutions: the input is read once for each strip of them."""

CACHED_PIXELS = 1 << 11
"""The largest images whose mean a convolution's kernel takes: it holds all of their pixels in a cache."""


def norms_around_convolutions(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether convolutions take over the norms before and after them."""
    return not NORMS_AROUND_CONVOLUTIONS.isdisjoint(backends.able("batch_norm_conv2d", device, dtype)[:1])


def has_fused_kernel(op: str, device: torch.device) -> bool:
    """Whether an op that takes over several layers has a kernel there. Off CPUs, generic rules beat the reference."""
    names = backends.able(op, device, torch.float32)
    return bool(names) if device.type == "cpu" or backends.requested() else names[:1] not in ((), ("reference",))
