"""Runs the Triton kernels on CPU tensors (TRITON_INTERPRET=1) against the reference, bit for bit on small integers.

Started by test_backends.py in a process of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dzkernels

CASES = [
    # N, Cin, H, W, O, kernel, stride, padding, dilation, groups
    (2, 3, 8, 8, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 1, 5, 7, 1, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (2, 4, 11, 10, 6, (3, 2), (3, 2), (1, 0), (1, 1), 2),
    (1, 6, 9, 8, 6, (3, 3), (2, 1), (2, 3), (2, 3), 6),
    (1, 2, 4, 30, 70, (1, 1), (1, 1), (0, 0), (1, 1), 1),
]


def ints(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).float()


def both(op: str, *args: object, **kwargs: object) -> None:
    with dzkernels.use_backend("triton"):
        got = getattr(dzkernels, op)(*args, **kwargs)
    with dzkernels.use_backend("reference"):
        wanted = getattr(dzkernels, op)(*args, **kwargs)
    assert torch.equal(got, wanted), (op, kwargs)


def main() -> None:
    torch.manual_seed(0)
    for samples, channels, height, width, rows, kernel, stride, padding, dilation, groups in CASES:
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        for count in (0, 1, 3):
            coord = torch.stack([torch.randint(0, s, (count,)) for s in (rows, channels // groups, *kernel)], 1)
            x, step = ints(samples, channels, height, width), torch.full((count,), 0.5)
            both("conv2d_tap", x, coord, step, kernel=kernel, out_channels=rows, **geometry)
            x = x.contiguous(memory_format=torch.channels_last)
            both("conv2d_tap", x, coord, step, kernel=kernel, out_channels=rows, **geometry)
            delta, channel = ints(count, samples, height, width), torch.randint(0, channels, (count,))
            both("channel_conv2d", delta, channel, ints(rows, channels // groups, *kernel), **geometry)
    print("all equal")


if __name__ == "__main__":
    main()
