from __future__ import annotations

import torch
from torch import Tensor

from .._check import dtype_name, output_size
from .._norm import moments
from . import launch, refused

Size = tuple[int, int]

_MAX_PIXEL_BYTES = 512
"""Maximum bytes of a pixel: with more, the weights of 16 output channels do not fit the shared memory of every GPU."""


def run(
    delta: Tensor, weight: Tensor, *, stride: Size, padding: Size, dilation: Size, groups: int,
    next_zc: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    reason = _refusal(delta, weight, stride, dilation, groups)
    if reason is not None:
        raise refused(__name__, reason)
    count, samples, channels, height, width = delta.shape
    rows, columns = output_size(height, width, (3, 3), stride, padding, dilation)
    outs = weight.shape[0]
    images, weight = _aligned(delta.permute(0, 1, 3, 4, 2)), _aligned(weight.permute(0, 2, 3, 1))
    out = torch.empty(count, samples, rows, columns, outs, dtype=delta.dtype, device=delta.device)
    launch(
        __name__, images, weight, out, int(delta.dtype is torch.bfloat16),
        count * samples, height, width, channels, rows, columns, outs, *stride, *padding,
    )  # fmt: skip
    result = out.permute(0, 1, 4, 2, 3)
    if next_zc is None:
        return result
    # one memory layout, hence one order of summation
    return result, moments(result, next_zc.contiguous(memory_format=torch.channels_last))


def _refusal(delta: Tensor, weight: Tensor, stride: Size, dilation: Size, groups: int) -> str | None:
    """Why the kernel cannot do this, None if it can."""
    outs, channels, *kernel = weight.shape
    if kernel != [3, 3] or dilation != (1, 1) or groups != 1 or max(stride) > 2:
        return (
            "its kernel is for 3x3 weights and strides of 1 or 2, without dilation or groups, got "
            f"{kernel[0]}x{kernel[1]}, stride={stride}, dilation={dilation}, groups={groups}"
        )
    max_channels = _MAX_PIXEL_BYTES // delta.element_size()
    if channels % 16 or outs % 16 or channels > max_channels:
        return (
            f"its kernel takes multiples of 16 channels, of {dtype_name(delta.dtype)} at most {max_channels} in, "
            f"got {channels} in and {outs} out"
        )
    capability = torch.cuda.get_device_capability(delta.device)
    if capability < (8, 0):
        return f"its kernel needs compute capability 8.0, {delta.device} has {capability[0]}.{capability[1]}"
    return None


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and aligned to 16 bytes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
