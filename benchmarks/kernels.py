"""Every op of dzkernels alone, on shapes of the works, beside what the machine can do at most.

    python -m benchmarks.kernels [--op conv2d_tap,...] [--threads 1] [--no-gate]

Rates are of CPU time, best of several calls, with freed memory kept. Traffic counts every input and result once,
arithmetic counts products only.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import dzkernels

from . import machine
from .throughput import RESULTS, gated, parser, record

KEY = ("op", "case", "isa", "threads")


@dataclass(frozen=True)
class Kernel:
    """One op on one shape.

    make   builds positional and keyword arguments
    flops  of products in one call, done plainly; 0 for an op that only moves and combines values
    torch  the same by torch, in the layout where it is fastest
    """

    op: str
    case: str
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    flops: float = 0.0
    torch: bool = False


def _images(*shape: int) -> Tensor:
    """[..., C, H, W] in channels-last memory."""
    *outer, c, h, w = shape
    return torch.randn(*outer, h, w, c).movedim(-1, -3)


def _channels(count: int, channels: int) -> Tensor:
    return torch.arange(count) % channels


def _tap(p: int, n: int, c: int, size: int) -> Any:
    coord = torch.stack([torch.arange(p) % c, torch.arange(p) % c, torch.arange(p) % 3, torch.arange(p) % 3], 1)
    return (torch.randn(n, c, size, size), coord, torch.full((p,), 5e-3)), {
        "kernel": 3,
        "padding": 1,
        "out_channels": c,
    }


def _channel_conv(p: int, n: int, c: int, size: int) -> Any:
    delta = torch.randn(p, n, size, size)
    return (delta, _channels(p, c), torch.randn(c, c, 3, 3)), {"padding": 1}


def _dense_conv(p: int, n: int, c: int, size: int, dtype: torch.dtype) -> Any:
    return (_images(p, n, c, size, size).to(dtype), _images(c, c, 3, 3).to(dtype)), {"padding": 1}


def _channel_norm(p: int, n: int, c: int, size: int) -> Any:
    x, y = torch.randn(n, c, size, size), torch.randn(n, c, size, size)
    zero, one = torch.zeros(c, dtype=torch.float64), torch.ones(c, dtype=torch.float64)
    return (1e-2 * torch.randn(p, n, size, size), _channels(p, c), x, zero, one, one), {"y": y, "relu": True}


def _dense_norm(p: int, n: int, c: int, size: int) -> Any:
    one = torch.ones(c, dtype=torch.float64)
    residual, y = 1e-2 * _images(p, n, c, size, size), _images(n, c, size, size)
    arguments = (1e-2 * _images(p, n, c, size, size), _images(n, c, size, size), one, one)
    return arguments, {"residual": residual, "y": y, "relu": True}


def _norm_conv(p: int, n: int, c: int, size: int) -> Any:
    arguments, options = _dense_norm(p, n, c, size)
    return (*arguments[:3], _images(c, c, 3, 3), arguments[3]), options | {"padding": 1}


def _feature_cross_entropy(p: int, n: int, c: int, k: int) -> Any:
    log_probs = torch.randn(n, k, dtype=torch.float64).log_softmax(1)
    return (1e-2 * torch.randn(p, n), _channels(p, c), torch.randn(k, c), log_probs, torch.arange(n) % k), {}


def _cross_entropy(p: int, n: int, k: int) -> Any:
    log_probs = torch.randn(n, k, dtype=torch.float64).log_softmax(1)
    return (log_probs, torch.arange(n) % k, 1e-2 * torch.randn(p, n, k)), {}


def _rows(p: int, r: int, m: int) -> tuple[Tensor, Tensor]:
    return 1e-2 * torch.randn(p, r, m), torch.randn(r, m)


def _layer_norm(p: int, r: int, m: int) -> Any:
    return (*_rows(p, r, m), torch.ones(r, dtype=torch.float64), torch.ones(m)), {"eps": 1e-5}


def _softmax(p: int, r: int, m: int) -> Any:
    delta, logits = _rows(p, r, m)
    return (delta, logits.softmax(1)), {}


def _attention(p: int, b: int, t: int, d: int) -> Any:
    q, k, v = torch.randn(3, b, t, d)
    moved = 1e-2 * torch.randn(3, p, b, t, d)
    return (*moved, q, k, v, (q @ k.mT * d**-0.5).softmax(-1)), {"scale": d**-0.5}


def _mlp(p: int, r: int, m: int, h: int) -> Any:
    delta, _ = _rows(p, r, m)
    return (delta, torch.randn(h, m) / m**0.5, torch.randn(r, h), torch.randn(m, h) / h**0.5), {}


def _linear(p: int, r: int, k: int, m: int, norm: bool) -> Any:
    delta, zc = _rows(p, r, k)
    weight, one = torch.randn(m, k) / k**0.5, torch.ones(r, dtype=torch.float64)
    if norm:
        return (delta, weight, None, dzkernels.RowNorm(zc, one, torch.ones(k), 1e-5)), {}
    return (delta, weight, 1e-2 * torch.randn(p, r, m)), {}


def _self_attention(p: int, n: int, h: int, t: int, d: int) -> Any:
    k = h * d
    delta, zc = _rows(p, n * t, k)
    q, key, v = torch.randn(3, n, h, t, d)
    probs = (q @ key.mT * d**-0.5).softmax(-1)
    norm = dzkernels.RowNorm(zc, torch.ones(n * t, dtype=torch.float64), torch.ones(k), 1e-5)
    weight, project = torch.randn(h, 3 * d, k) / k**0.5, torch.randn(k, k) / k**0.5
    return (delta, weight, q, key, v, probs, project, delta, norm), {"scale": d**-0.5}


def _products(p: int, n: int, c: int, size: int) -> float:
    return 2.0 * 9 * p * n * c * size**2


KERNELS = (
    Kernel("conv2d_tap", "W1 first layer, P 16", lambda: _tap(16, 128, 3, 32)),
    Kernel("conv2d_tap", "W2 stage 3, P 64", lambda: _tap(64, 32, 64, 8)),
    Kernel("channel_conv2d", "W1 layer 2, P 16", lambda: _channel_conv(16, 128, 18, 16), _products(16, 128, 18, 16)),
    Kernel("channel_conv2d", "W2 stage 1, P 8", lambda: _channel_conv(8, 32, 16, 32), _products(8, 32, 16, 32)),
    Kernel("channel_conv2d", "W2 stage 3, P 64", lambda: _channel_conv(64, 32, 64, 8), _products(64, 32, 64, 8)),
    *(
        Kernel(
            "dense_conv2d",
            f"{c} channels {size}x{size}, {str(dtype).removeprefix('torch.')}{', by torch' * by_torch}",
            lambda p=p, n=n, c=c, size=size, dtype=dtype: _dense_conv(p, n, c, size, dtype),  # type: ignore[misc]
            c * _products(p, n, c, size),
            by_torch,
        )
        for p, n, c, size in ((2, 32, 16, 32), (4, 128, 18, 8), (4, 32, 32, 16), (8, 32, 64, 8))
        for dtype in (torch.float32, torch.bfloat16)
        for by_torch in (False, True)
    ),
    Kernel("channel_batch_norm", "W1 first layer, P 16, relu", lambda: _channel_norm(16, 128, 18, 32)),
    Kernel("channel_batch_norm", "W2 stage 2, P 32, relu", lambda: _channel_norm(32, 32, 32, 16)),
    Kernel("dense_batch_norm", "W2 stage 1, P 4, residual, relu", lambda: _dense_norm(4, 32, 16, 32)),
    Kernel("dense_batch_norm", "W2 stage 3, P 16, residual, relu", lambda: _dense_norm(16, 32, 64, 8)),
    Kernel("batch_norm_conv2d", "W2 stage 3, P 16", lambda: _norm_conv(16, 32, 64, 8), 64 * _products(16, 32, 64, 8)),
    Kernel("channel_linear_cross_entropy", "W1 head, P 384", lambda: _feature_cross_entropy(384, 128, 18, 10)),
    Kernel("cross_entropy_difference", "W1 head, P 1024", lambda: _cross_entropy(1024, 128, 10)),
    Kernel("cross_entropy_difference", "W3 head, P 4096", lambda: _cross_entropy(4096, 64, 10)),
    Kernel("gelu_difference", "W4, P 4", lambda: (_rows(4, 1024, 384), {})),
    Kernel("layer_norm_difference", "W4, P 16", lambda: _layer_norm(16, 1024, 96)),
    Kernel("mlp_difference", "W4, P 8", lambda: _mlp(8, 1024, 96, 384), 4.0 * 8 * 1024 * 96 * 384),
    Kernel(
        "linear_difference", "W4 norm and qkv, P 8", lambda: _linear(8, 1024, 96, 288, True), 2.0 * 8 * 1024 * 96 * 288
    ),
    Kernel(
        "linear_difference",
        "W4 projection and residual, P 8",
        lambda: _linear(8, 1024, 96, 96, False),
        2.0 * 8 * 1024 * 96 * 96,
    ),
    Kernel("softmax_difference", "W4 attention, P 4", lambda: _softmax(4, 16 * 3 * 64, 64)),
    Kernel("attention_difference", "W4, P 4", lambda: _attention(4, 16 * 3, 64, 32), 8.0 * 4 * 48 * 64**2 * 32),
    Kernel(
        "self_attention_difference",
        "W4, P 8",
        lambda: _self_attention(8, 16, 3, 64, 32),
        8.0 * 8 * 1024 * 96**2 + 8.0 * 8 * 48 * 64**2 * 32,
    ),
)


def traffic(arguments: Any, result: Tensor) -> int:
    """Bytes of all tensors in and out, once each."""
    tensors = [t for t in pytree.tree_leaves((arguments, result)) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(kernel: Kernel, tops: dict[str, float]) -> dict[str, str]:
    torch.manual_seed(0)
    function = getattr(dzkernels, kernel.op)
    arguments, options = kernel.make()
    moved = traffic((arguments, options), function(*arguments, **options))
    with dzkernels.use_backend("reference" if kernel.torch else None):
        calls = machine.rate(lambda: function(*arguments, **options), 1.0)
    flops, bandwidth = kernel.flops * calls, moved * calls
    return {
        "op": kernel.op,
        "case": kernel.case,
        "us": f"{1e6 / calls:.4g}",
        "gflops": f"{flops / 1e9:.4g}" if flops else "",
        "of_float32_peak": f"{flops / tops['float32_flops']:.3f}" if flops else "",
        "gbs": f"{bandwidth / 1e9:.4g}",
        "of_memory_copy": f"{bandwidth / tops['memory_bytes']:.3f}",
        "mib": f"{moved / 2**20:.4g}",
        "peak_float32_gflops": f"{tops['float32_flops'] / 1e9:.4g}",
        "peak_bfloat16_gflops": f"{tops['bfloat16_flops'] / 1e9:.4g}",
        "copy_cache_gbs": f"{tops['cache_bytes'] / 1e9:.4g}",
        "copy_memory_gbs": f"{tops['memory_bytes'] / 1e9:.4g}",
    }


def path() -> Path:
    return RESULTS / f"kernels-{machine.slug()}.csv"


def main() -> None:
    arguments = parser("Every op of dzkernels alone, beside what the machine can do at most.")
    arguments.add_argument("--op", default="", help="ops to measure, by commas (all)")
    options = arguments.parse_args()
    wanted = options.op.split(",") if options.op else list(dzkernels.OPS)
    gated(options)
    dzkernels.keep_freed_memory()
    tops = machine.ceilings()
    print({name: f"{value / 1e9:.4g}e9/s" for name, value in tops.items()})
    rows, failed = [], []
    for kernel in KERNELS:
        if kernel.op in wanted and kernel.op in dzkernels.OPS:
            try:
                row = measure(kernel, tops)
            except Exception:  # one op that does not run keeps no other from being measured
                failed.append(f"{kernel.op} ({kernel.case}): {traceback.format_exc(limit=1)}")
                continue
            rows.append(row | machine.facts(options.threads) | {"gate": options.gate})
            arithmetic = f"{row['gflops']} GFLOP/s, " if row["gflops"] else ""
            print(f"  {kernel.op:25} {kernel.case:34} {row['us']:>9} us  {arithmetic}{row['gbs']} GB/s", flush=True)
    record(path(), rows, KEY)
    without = sorted(set(wanted) - {kernel.op for kernel in KERNELS})
    if without:
        print(f"no case for {', '.join(without)}: add one to KERNELS in benchmarks/kernels.py")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
