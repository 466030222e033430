"""Argument checks. Every error reads 'dz::op: argument must be ..., got ...'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def of_dtype(op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"dz::{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(dtype_name(d) for d in dtypes) if len(dtypes) < 4 else "of a floating-point dtype"
        raise TypeError(f"dz::{op}: {name} must be {wanted}, got {dtype_name(tensor.dtype)}")


def of_shape(op: str, name: str, tensor: Tensor, wanted: Sequence[int | None], meaning: str) -> None:
    """`wanted` holds sizes, None where any size will do; `meaning` names the dimensions: '[P, 4]'."""
    sizes = tensor.shape
    if len(sizes) != len(wanted) or any(w is not None and w != s for w, s in zip(wanted, sizes, strict=True)):
        known = "[" + ", ".join("*" if w is None else str(w) for w in wanted) + "]"
        detail = meaning if all(w is None for w in wanted) else f"{meaning} = {known}"
        raise ValueError(f"dz::{op}: {name} must be of shape {detail}, got {shape(tensor)}")


def same_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"dz::{op}: {name} must be on {other.device} like {other_name}, got {tensor.device}")


def in_range(op: str, name: str, index: Tensor, size: int, what: str) -> None:
    """Each index in 0 .. size - 1. Only on the CPU: elsewhere looking would wait for the device."""
    if index.numel() == 0 or index.device.type != "cpu":
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= size:
        raise ValueError(f"dz::{op}: {name} must be in 0..{size - 1} ({what}), got {low if low < 0 else high}")


def pair(op: str, name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    both = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(both) != 2 or not all(isinstance(v, int) and v >= least for v in both):
        raise ValueError(f"dz::{op}: {name} must be one or two integers of at least {least}, got {value!r}")
    return both


def output_size(
    op: str,
    height: int,
    width: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    size = tuple(
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
    )
    if min(size) < 1:
        raise ValueError(
            f"dz::{op}: kernel must be at most the padded input [{height + 2 * padding[0]}, {width + 2 * padding[1]}], "
            f"got {list(kernel)} with dilation {list(dilation)}"
        )
    return size[0], size[1]
