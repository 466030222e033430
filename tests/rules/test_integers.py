"""Small integers and a step that is a power of two: every sum is exact in float32, so quotients agree bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from helpers import small_ints
from rules.cases import Case, seq, supervised
from rules.subject import Subject


def _integer_parameters(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = build()
        with torch.no_grad():
            for k, p in enumerate(model.parameters()):
                p.copy_(small_ints(*p.shape, seed=k, low=-2, high=2))
        return model

    return made


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        return (self.two(x) + x).relu()


class TwiceUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.one(x).relu()) + x


ROWS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (seq(lambda: nn.Linear(6, 8), nn.ReLU, lambda: nn.Linear(8, 4)), (4, 6)),
    "linear-3d": (seq(lambda: nn.Linear(6, 8), nn.ReLU, lambda: nn.Linear(8, 4)), (2, 3, 6)),
    "conv1d": (seq(lambda: nn.Conv1d(2, 4, 3), nn.ReLU, lambda: nn.Conv1d(4, 3, 3, stride=2)), (2, 2, 9)),
    "conv2d": (seq(lambda: nn.Conv2d(2, 4, 3, padding=1), nn.ReLU, lambda: nn.Conv2d(4, 3, 3)), (2, 2, 6, 6)),
    "conv2d-deep": (
        seq(
            lambda: nn.Conv2d(2, 3, 3),
            nn.ReLU,
            lambda: nn.Conv2d(3, 3, 3, padding=1),
            nn.ReLU,
            lambda: nn.Conv2d(3, 2, 2),
        ),
        (2, 2, 6, 6),
    ),
    "conv2d-grouped": (seq(lambda: nn.Conv2d(2, 4, 3), lambda: nn.Conv2d(4, 4, 2, groups=2)), (2, 2, 6, 6)),
    "conv2d-depthwise": (seq(lambda: nn.Conv2d(2, 4, 3), lambda: nn.Conv2d(4, 4, 2, groups=4)), (2, 2, 6, 6)),
    "conv2d-dilated": (seq(lambda: nn.Conv2d(2, 4, 2, dilation=2), nn.ReLU, lambda: nn.Conv2d(4, 2, 2)), (2, 2, 6, 6)),
    "conv2d-transposed": (
        seq(lambda: nn.Conv2d(2, 4, 3), nn.ReLU, lambda: nn.ConvTranspose2d(4, 2, 3, stride=2)),
        (2, 2, 5, 5),
    ),
    "conv3d": (seq(lambda: nn.Conv3d(2, 3, 2), nn.ReLU, lambda: nn.Conv3d(3, 2, 2)), (2, 2, 4, 4, 4)),
    "maxpool": (
        seq(lambda: nn.Conv2d(2, 4, 3), nn.ReLU, lambda: nn.MaxPool2d(2), nn.Flatten, lambda: nn.Linear(16, 3)),
        (2, 2, 6, 6),
    ),
    "residual-add": (Skip, (2, 2, 5, 5)),
    "twice-used": (TwiceUsed, (3, 6)),
    "leaky-relu": (seq(lambda: nn.Linear(6, 8), lambda: nn.LeakyReLU(0.25), lambda: nn.Linear(8, 4)), (4, 6)),
    "clamp": (seq(lambda: nn.Linear(6, 8), lambda: nn.Hardtanh(-2, 3), lambda: nn.Linear(8, 4)), (4, 6)),
}


def _weighted(out: Tensor) -> Tensor:
    flat = out.reshape(-1)
    return (flat * (torch.arange(flat.numel(), dtype=out.dtype) % 5 - 2)).sum()


@pytest.mark.parametrize("id", ROWS)
def test_bit_for_bit(id: str) -> None:
    build, shape = ROWS[id]
    case = Case(
        id,
        _integer_parameters(build),
        lambda: ((small_ints(*shape, seed=9, low=-3, high=3),), ()),
        supervised(_weighted),
    )
    subject = Subject(case, per_tensor=30)
    for mu in (0.5, 2.0):
        want, _ = subject.plain(mu)
        got = subject.ours(mu, "float32")
        assert any(bool(q.any()) for q in want.values())
        for name in want:
            assert torch.equal(got[name], want[name]), f"mu {mu:g}, {name}: {got[name] - want[name]}"
