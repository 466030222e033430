"""The kernels on a GPU against the reference on the CPU. Skipped where torch sees no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dzkernels
from dzkernels import backends
from helpers import UNIT, assert_bounded, assert_exact, integers, normal, small_ints

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

GPU_BACKENDS = ["cuda", "triton"]
# N, Cin, H, W, O, kernel, stride, padding, dilation, groups
CONVOLUTIONS = [
    (2, 3, 8, 8, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 1, 5, 7, 1, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (2, 4, 11, 10, 6, (3, 2), (3, 2), (1, 0), (1, 1), 2),
    (3, 6, 9, 8, 6, (3, 3), (2, 1), (2, 3), (2, 3), 6),
    (2, 5, 33, 70, 70, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 2, 12, 12, 600, (7, 7), (1, 1), (3, 3), (1, 1), 1),  # weights do not fit into shared memory
]


def on_gpu(op: str, backend: str, *args: Tensor | None, **kwargs: object) -> Tensor:
    if not backends.has_kernel(backend, op):
        pytest.skip(f"{backend} has no kernel for {op}")
    moved = [arg.cuda() if isinstance(arg, Tensor) else arg for arg in args]
    moved_kwargs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    with dzkernels.use_backend(backend):
        return getattr(dzkernels, op)(*moved, **moved_kwargs).cpu()


def wanted(op: str, *args: Tensor | None, **kwargs: object) -> Tensor:
    with dzkernels.use_backend("reference"):
        return getattr(dzkernels, op)(*args, **kwargs)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_bit_for_bit(case: tuple[int, ...], count: int, backend: str) -> None:
    samples, channels, height, width, rows, kernel, stride, padding, dilation, groups = case
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    sizes = (rows, channels // groups, *kernel)
    coord = torch.stack([integers([count], size, seed=k) for k, size in enumerate(sizes)], 1)
    step, x = torch.full((count,), 0.5), small_ints(samples, channels, height, width, seed=1)
    tap = {"kernel": kernel, "out_channels": rows, **geometry}
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        got = on_gpu("conv2d_tap", backend, x, coord, step, **tap)
        assert_exact(got, wanted("conv2d_tap", x, coord, step, **tap))
    delta, channel = small_ints(count, samples, height, width, seed=2), integers([count], channels, seed=3)
    weight = small_ints(rows, channels // groups, *kernel, seed=4)
    got = on_gpu("channel_conv2d", backend, delta, channel, weight, **geometry)
    assert_exact(got, wanted("channel_conv2d", delta, channel, weight, **geometry))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(5, 4, 3, 8, 8), (1, 1, 1, 5, 7), (3, 16, 4, 32, 32), (0, 2, 2, 3, 3)])
def test_channel_batch_norm(shape: tuple[int, ...], relu: bool, backend: str) -> None:
    count, samples, channels, height, width = shape
    x = normal(samples, channels, height, width, seed=1) + 3
    mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
    y = ((x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()).float()
    args = (normal(count, samples, height, width, seed=2), integers([count], channels, seed=3), x, mean, var)
    kwargs = {"gamma": normal(channels, seed=4), "y": y, "relu": relu}
    got, reference = (
        on_gpu("channel_batch_norm", backend, *args, **kwargs),
        wanted("channel_batch_norm", *args, **kwargs),
    )
    # Both round z once and the result once; the sums are float64.
    assert_bounded(got, reference, 4 * UNIT[torch.float32] * (1 + reference.abs()))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
@pytest.mark.parametrize("shape", [(3, 5, 10), (2, 300, 1000), (0, 2, 3)])
def test_cross_entropy_difference(shape: tuple[int, int, int], scale: float, backend: str) -> None:
    samples, classes = shape[1:]
    log_probs = normal(samples, classes, seed=1, dtype=torch.float64).log_softmax(1)
    args = (log_probs, integers([samples], classes, seed=2), normal(*shape, seed=3) * scale)
    got, reference = on_gpu("cross_entropy_difference", backend, *args), wanted("cross_entropy_difference", *args)
    assert_bounded(got, reference, 1e-13 * (scale + reference.abs()))
