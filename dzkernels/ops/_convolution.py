"""Declarations and checks shared by the ops of convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .._check import Pair, Size
from .._op import BASE, INT64, LEAD, LIKE, Arg, Sizes

# A perturbed weight (a tap), and a difference in one input channel.
TAP = (Arg("x", "N, Cin, H, W", LEAD), Arg("coord", "P, 4", INT64), Arg("step", "P", LIKE))
CHANNEL = (Arg("delta", "P, N, H, W", LEAD), Arg("channel", "P", INT64), Arg("weight", "O, Cg, kh, kw", LIKE))

# The centred base input of the norm after a convolution, given where the op shall return the norm's moments.
NEXT = Arg("next_zc", "N, O, Ho, Wo", BASE, optional=True, filled="N, O, Ho and Wo")


def tap_geometry(
    op: str, sizes: Sizes, coord: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int,
    out_channels: int, **after: Tensor,
) -> tuple[Size, Size, Size, Size]:  # fmt: skip
    """kernel, stride, padding and dilation as pairs. ValueError for a coordinate outside the weight."""
    kernel = check.pair(op, "kernel", kernel, 1)
    stride, padding, dilation = check.geometry(op, stride, padding, dilation)
    channels = sizes["Cin"]
    if groups < 1 or channels % groups:
        raise ValueError(f"dz::{op}: groups must be a divisor of the {channels} channels of x, got {groups}")
    if out_channels < 1 or out_channels % groups:
        raise ValueError(f"dz::{op}: out_channels must be a positive multiple of groups = {groups}, got {out_channels}")
    sizes.update(kh=kernel[0], kw=kernel[1])
    output_size(op, sizes, stride, padding, dilation, **after)
    weight = (out_channels, channels // groups, *kernel)
    if coord.device.type == "cpu" and coord.shape[0]:
        low, high = torch.aminmax(coord, dim=0)
        if int(low.min()) < 0 or any(h >= size for h, size in zip(high.tolist(), weight, strict=True)):
            bad = int(((coord < 0) | (coord >= torch.tensor(weight))).any(1).nonzero()[0, 0])
            raise ValueError(
                f"dz::{op}: coord must be inside the weight {list(weight)}, got coord[{bad}] = {coord[bad].tolist()}"
            )
    return kernel, stride, padding, dilation


def channel_geometry(
    op: str, sizes: Sizes, channel: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int, **after: Tensor
) -> tuple[Size, Size, Size]:
    """stride, padding and dilation as pairs. ValueError for a channel outside the input."""
    stride, padding, dilation = check.geometry(op, stride, padding, dilation)
    groups_of(op, sizes, groups)
    output_size(op, sizes, stride, padding, dilation, **after)
    check.in_range(op, "channel", channel, sizes["Cg"] * groups, "input channels")
    return stride, padding, dilation


def groups_of(op: str, sizes: Sizes, groups: int) -> None:
    if groups < 1 or sizes["O"] % groups:
        raise ValueError(f"dz::{op}: groups must divide the {sizes['O']} rows of weight, got {groups}")


def output_size(op: str, sizes: Sizes, stride: Size, padding: Size, dilation: Size, **after: Tensor | None) -> None:
    """Adds Ho and Wo to the sizes. The tensors in `after` must be of shape [N, O, Ho, Wo]."""
    kernel = (sizes["kh"], sizes["kw"])
    sizes["Ho"], sizes["Wo"] = check.fits(op, sizes["H"], sizes["W"], kernel, stride, padding, dilation)
    for name, tensor in after.items():
        if tensor is not None:
            check.of_shape(op, name, tensor, [sizes[dim] for dim in ("N", "O", "Ho", "Wo")], "[N, O, Ho, Wo]")


def empty_result(sizes: Sizes, weight: Tensor, next_zc: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """The result of a convolution without elements."""
    perturbations, samples, outs = sizes["P"], sizes["N"], sizes["O"]
    out = weight.new_empty(perturbations, samples, sizes["Ho"], sizes["Wo"], outs).permute(0, 1, 4, 2, 3)
    return out if next_zc is None else (out, out.new_empty(perturbations, 2, outs, dtype=torch.float64))
