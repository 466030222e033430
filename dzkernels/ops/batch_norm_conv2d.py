from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from .. import _check as check
from .. import backends
from .._check import Pair
from .._op import BASE_OR_BFLOAT16, BFLOAT16, Arg, Kernel, Op
from ._batch_norm import DENSE, dense_options, dense_tensors
from ._convolution import NEXT, empty_result, output_size

OP = Op(
    __name__,
    *DENSE,
    Arg("weight", "O, C, kh, kw", BASE_OR_BFLOAT16),
    NEXT,
    cpu=Kernel(BFLOAT16, note="`dense_batch_norm`, then PyTorch"),
    triton=Kernel(BFLOAT16),
)


@overload
def batch_norm_conv2d(
    delta: Tensor, zc: Tensor, var: Tensor, weight: Tensor, gamma: Tensor | None = None, *, eps: float = 1e-5,
    training: bool = True, residual: Tensor | None = None, residual_channel: Tensor | None = None,
    y: Tensor | None = None, relu: bool = False, moments: Tensor | None = None, stride: Pair = 1, padding: Pair = 0,
    dilation: Pair = 1, next_zc: None = None,
) -> Tensor: ...  # fmt: skip


@overload
def batch_norm_conv2d(
    delta: Tensor, zc: Tensor, var: Tensor, weight: Tensor, gamma: Tensor | None = None, *, eps: float = 1e-5,
    training: bool = True, residual: Tensor | None = None, residual_channel: Tensor | None = None,
    y: Tensor | None = None, relu: bool = False, moments: Tensor | None = None, stride: Pair = 1, padding: Pair = 0,
    dilation: Pair = 1, next_zc: Tensor,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def batch_norm_conv2d(
    delta: Tensor,
    zc: Tensor,
    var: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    *,
    eps: float = 1e-5,
    training: bool = True,
    residual: Tensor | None = None,
    residual_channel: Tensor | None = None,
    y: Tensor | None = None,
    relu: bool = False,
    moments: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    next_zc: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A dense difference through batch norm, residual and ReLU, then through a conv2d.

    out[p] = conv2d(a[p], weight), a = dense_batch_norm(delta, zc, var, gamma, ..., out_dtype=weight.dtype)

    For a norm whose output only the convolution reads, so that a need not be stored.

    delta .. moments  as in dense_batch_norm
    weight            [O, C, kh, kw]  bfloat16 or the base dtype of dense_batch_norm
    next_zc           [N, O, Ho, Wo]  as in dense_conv2d: requests the moments that the next norm takes
    result            [P, N, O, Ho, Wo]  a view of contiguous [P, N, Ho, Wo, O] memory, dtype of weight;
                      with next_zc the pair (result, moments [P, 2, O])

    Exactness: a as in dense_batch_norm, rounded to the dtype of weight. The result is a sum of C kh kw products in any
    order, in float32 (float64 for float64), each product of float32 operands within 48 u; the sum is rounded once more.
    Cost: 2 C kh kw operations per output value. Reads delta twice (once if given moments) and residual once, writes
    the result. A kernel may recompute the norm for every tap that reads it.
    """
    options = dense_options(
        OP.name, eps=eps, training=training, residual=residual, residual_channel=residual_channel, y=y, relu=relu,
        moments=moments,
    )  # fmt: skip
    sizes = OP(delta, zc, var, gamma, *dense_tensors(**options), weight, next_zc)
    stride, padding, dilation = check.geometry(OP.name, stride, padding, dilation)
    output_size(OP.name, sizes, stride, padding, dilation, next_zc=next_zc)
    if sizes["P"] * sizes["O"] == 0:
        return empty_result(sizes, weight, next_zc)
    scale = torch.ones_like(var) if gamma is None else gamma.to(torch.float64)
    return backends.run(
        OP.name, delta, delta, zc, var, scale, weight, **options, stride=stride, padding=padding, dilation=dilation,
        next_zc=next_zc,
    )  # fmt: skip
