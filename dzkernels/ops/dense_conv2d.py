from __future__ import annotations

from typing import overload

from torch import Tensor

from .. import _check as check
from .. import backends
from .._check import Pair
from .._op import BFLOAT16, LEAD, LIKE, Arg, Kernel, Op
from ._convolution import NEXT, empty_result, groups_of, output_size

OP = Op(
    __name__,
    Arg("delta", "P, N, C, H, W", LEAD),
    Arg("weight", "O, Cg, kh, kw", LIKE),
    NEXT,
    cpu=Kernel(BFLOAT16),
    triton=Kernel(BFLOAT16, on_request=True, with_moments=True),
    cuda=Kernel(BFLOAT16, on_request=True),
)


@overload
def dense_conv2d(
    delta: Tensor, weight: Tensor, *, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1,
    next_zc: None = None,
) -> Tensor: ...  # fmt: skip


@overload
def dense_conv2d(
    delta: Tensor, weight: Tensor, *, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1,
    next_zc: Tensor,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def dense_conv2d(
    delta: Tensor,
    weight: Tensor,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    next_zc: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A dense difference through a conv2d; with next_zc also the moments that the batch norm after it takes.

    out[p, n, o, u, v] = sum_cij pad(delta)[p, n, g * Cg + c, u * sh + i * dh - ph, v * sw + j * dw - pw]
                         * weight[o, c, i, j]    with g = o // (O / groups)

    delta    [P, N, groups * Cg, H, W]  fastest as a view of contiguous [P, N, H, W, C] memory (channels last)
    weight   [O, Cg, kh, kw]            of the convolution, dtype of delta
    next_zc  [N, O, Ho, Wo]             centred base input of the norm after it, base dtype of dense_batch_norm
    result   [P, N, O, Ho, Wo]          a view of contiguous [P, N, Ho, Wo, O] memory, dtype of delta;
                                        with next_zc the pair (result, moments)

    moments[p, 0] = mean(out[p]) of the rounded result; means over N, Ho, Wo of each channel
    moments[p, 1] = mean(2 next_zc d + d^2), d = out[p] - mean(out[p]): the change of the variance; [P, 2, O] float64

    Exactness: a sum of Cg * kh * kw products per output in any order, in float32 for bfloat16. Two exceptions:

        3x3 kernel, stride 1   may use Winograd's F(4x4, 3x3) (Lavin and Gray, CVPR 2016): a few times the rounding
                               error of the plain sum, and a NaN or infinity spreads over its tile of 4x4 outputs
        tensor cores, float32  operands are split into two tf32, three products each: as accurate as the plain sum,
                               but an infinity may give NaN

    Moments are float64 sums of float32 sums of at most 256 terms, about a value near the mean.
    Cost: 2 * Cg * kh * kw operations per output; with Winograd a quarter of the products.
    """
    sizes = OP(delta, weight, next_zc)
    stride, padding, dilation = check.geometry(OP.name, stride, padding, dilation)
    groups_of(OP.name, sizes, groups)
    if sizes["C"] != groups * sizes["Cg"]:
        raise ValueError(
            f"dz::{OP.name}: delta must have groups * Cg = {groups * sizes['Cg']} channels, got {sizes['C']}"
        )
    output_size(OP.name, sizes, stride, padding, dilation, next_zc=next_zc)
    if sizes["P"] * sizes["N"] * sizes["O"] == 0:
        return empty_result(sizes, weight, next_zc)
    return backends.run(
        OP.name, delta, delta, weight, stride=stride, padding=padding, dilation=dilation, groups=groups,
        next_zc=next_zc,
    )  # fmt: skip
