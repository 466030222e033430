"""CGE on a GPU: against float64 on the CPU, with and without replay, launches counted. Skipped without a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepzero as dz
from estimators.small import batch, network, objective
from helpers import assert_exact
from judge import judge, tolerance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def images(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator)


CASES = {"linear": (network, batch), "convolutions": (convolutions, images)}


def on_the_gpu(id: str) -> tuple[nn.Module, Any]:
    """In evaluation mode the CPU and the GPU draw no dropout, which would differ."""
    build, data = CASES[id]
    return build().eval().cuda(), tuple(t.cuda() for t in data())


def launches(ours: dz.CGE, data: Any) -> int:
    """What the host starts in one estimate, kernels and graphs together."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        ours.estimate(data)
        torch.cuda.synchronize()
    return sum(e.count for e in seen.key_averages() if "LaunchKernel" in e.key or "GraphLaunch" in e.key)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("id", CASES)
def test_is_float64_on_the_cpu(id: str, precision: str) -> None:
    model, data = on_the_gpu(id)
    mu = 5e-3
    wide = dz.CGE(copy.deepcopy(model).cpu().double(), objective, mu=mu, precision="float64")
    wanted = wide.estimate((data[0].cpu().double(), data[1].cpu())).grads
    got = dz.CGE(model, objective, mu=mu, precision=precision).estimate(data).grads
    judge({name: g.cpu() for name, g in got.items()}, wanted).check(tolerance(precision, mu))


@pytest.mark.parametrize("id", CASES)
def test_replay_moves_no_bit(id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = on_the_gpu(id)
    ours = dz.CGE(model, objective, block=64)
    other = (0.9 * data[0] + 0.05, data[1])
    replayed = [ours.estimate(b).grads for b in (data, other, data)]
    with torch.no_grad():
        model[0].weight.data = 1.1 * model[0].weight
    replayed.append(ours.estimate(data).grads)
    monkeypatch.setenv("DZ_REPLAY", "0")
    moved = model[0].weight.data
    direct = [ours.estimate(data).grads]
    model[0].weight.data = CASES[id][0]().cuda()[0].weight.data
    direct = [ours.estimate(b).grads for b in (data, other, data)] + direct
    model[0].weight.data = moved
    for a, b in zip(replayed, direct, strict=True):
        for name in a:
            assert_exact(a[name].cpu(), b[name].cpu())


@pytest.mark.parametrize("id", CASES)
def test_a_step_is_few_launches(id: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A replayed block is filling two buffers, one graph and reading the result; the base pass comes on top."""
    model, data = on_the_gpu(id)
    ours = dz.CGE(model, objective, block=32)
    for _ in range(2):
        ours.estimate(data)
    replayed = launches(ours, data)
    monkeypatch.setenv("DZ_REPLAY", "0")
    ours.estimate(data)
    direct = launches(ours, data)
    with capsys.disabled():
        print(f"\n{id}: {replayed} launches an estimate with replay, {direct} without")
    assert replayed < direct
