"""Argument checks. Every error reads 'dz::op: argument must be ..., got ...'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Pair = int | Sequence[int]
Size = tuple[int, int]


def shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def of_type(op: str, name: str, tensor: Tensor | None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"dz::{op}: {name} must be a tensor, got {type(tensor).__name__}")
    return tensor


def of_dtype(op: str, name: str, tensor: Tensor | None, dtypes: Sequence[torch.dtype]) -> Tensor:
    tensor = of_type(op, name, tensor)
    if tensor.dtype not in dtypes:
        wanted = " or ".join(dtype_name(d) for d in dtypes) if len(dtypes) < 4 else "of a floating-point dtype"
        raise TypeError(f"dz::{op}: {name} must be {wanted}, got {dtype_name(tensor.dtype)}")
    return tensor


def of_shape(op: str, name: str, tensor: Tensor, wanted: Sequence[int | None], meaning: str) -> None:
    """`wanted` holds the sizes, None for any size; `meaning` names the dimensions: '[P, 4]'."""
    sizes = tensor.shape
    if len(sizes) != len(wanted) or any(w is not None and w != s for w, s in zip(wanted, sizes, strict=True)):
        known = "[" + ", ".join("*" if w is None else str(w) for w in wanted) + "]"
        detail = meaning if all(w is None for w in wanted) else f"{meaning} = {known}"
        raise ValueError(f"dz::{op}: {name} must be of shape {detail}, got {shape(tensor)}")


def same_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"dz::{op}: {name} must be on {other.device} like {other_name}, got {tensor.device}")


def in_range(op: str, name: str, index: Tensor, size: int, what: str) -> None:
    """Requires each index to be in 0 .. size - 1. Checked on the CPU only: a GPU would have to be waited for."""
    if index.numel() == 0 or index.device.type != "cpu":
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= size:
        raise ValueError(f"dz::{op}: {name} must be in 0..{size - 1} ({what}), got {low if low < 0 else high}")


def pair(op: str, name: str, value: Pair, least: int) -> Size:
    both = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(both) != 2 or not all(isinstance(v, int) and v >= least for v in both):
        raise ValueError(f"dz::{op}: {name} must be one or two integers of at least {least}, got {value!r}")
    return both


def geometry(op: str, stride: Pair, padding: Pair, dilation: Pair) -> tuple[Size, Size, Size]:
    return pair(op, "stride", stride, 1), pair(op, "padding", padding, 0), pair(op, "dilation", dilation, 1)


def output_size(height: int, width: int, kernel: Size, stride: Size, padding: Size, dilation: Size) -> Size:
    """Height and width of a convolution's output; below 1 where the kernel is larger than the padded input."""
    rows, columns = (
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
    )
    return rows, columns


def fits(op: str, height: int, width: int, kernel: Size, stride: Size, padding: Size, dilation: Size) -> Size:
    """output_size, or ValueError where the kernel is larger than the padded input."""
    size = output_size(height, width, kernel, stride, padding, dilation)
    if min(size) < 1:
        raise ValueError(
            f"dz::{op}: kernel must be at most the padded input [{height + 2 * padding[0]}, {width + 2 * padding[1]}], "
            f"got {list(kernel)} with dilation {list(dilation)}"
        )
    return size


def float_dtype(op: str, name: str, dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if dtype is None:
        return default
    if dtype not in FLOATS:
        raise TypeError(f"dz::{op}: {name} must be a floating-point dtype, got {dtype}")
    return dtype


def eps(op: str, value: float, name: str = "eps") -> float:
    if not value >= 0:
        raise ValueError(f"dz::{op}: {name} must be at least 0, got {value}")
    return float(value)


def pool(op: str, value: int, height: int, width: int) -> int:
    if not isinstance(value, int) or not 1 <= value <= max(1, min(height, width)):
        raise ValueError(
            f"dz::{op}: pool must be an integer in 1..{min(height, width)} (height and width), got {value!r}"
        )
    return value


def form_of_gelu(op: str, approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"dz::{op}: approximate must be 'none' or 'tanh', got {approximate!r}")
    return approximate


def given(op: str, name: str, tensor: Tensor | None, when: str) -> Tensor:
    """`tensor`, which the option `when` requires: 'y must be given with relu=True, got None'."""
    if tensor is None:
        raise ValueError(f"dz::{op}: {name} must be given with {when}, got None")
    return tensor
