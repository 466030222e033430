"""``check``: it finds a wrong rule, names slow ops, and suggests a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero.models import vit
from deepzero.report.check import check
from deepzero.rules import RULES

aten = torch.ops.aten


def objective(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(b[0]), b[1])


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_a_right_model_passes(precision: str) -> None:
    report = check(model(), objective, batch(), precision=precision)
    assert report.ok, str(report)
    assert [r.parameter for r in report.rows] == [n for n, _ in model().named_parameters()]
    assert "every op has a difference rule" in str(report)
    assert "suggested mu" in str(report)


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES[aten.tanh.default]

    def wrong(run: Any, node: Any) -> Any:
        carrier = right(run, node)
        return type(carrier)(**{**vars(carrier), "values": carrier.values * 1.001})

    monkeypatch.setitem(RULES, aten.tanh.default, replace(right, function=wrong))
    report = check(model(), objective, batch())
    assert not report.ok
    assert [r.ok for r in report.rows] == [False, False, True, True]
    assert "WRONG" in str(report)


def test_slow_ops_are_named() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0e(self.inner(x))

    with pytest.warns(UserWarning, match="special_i0e"):
        report = check(Slow(), objective, batch())
    assert report.fallbacks == ("aten.special_i0e.default",)
    assert report.ok
    assert "evaluated in float64 once per query: aten.special_i0e.default" in str(report)


def test_a_piecewise_constant_network_is_told_a_large_step() -> None:
    class Signs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5, 64), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sign(self.a(x)))

    report = check(Signs(), objective, batch())
    assert report.mu == 0.1
    assert "piecewise constant in 2 of 4 tensors (a.weight, ...)" in report.advice


def test_a_smooth_network_gets_the_largest_accurate_step() -> None:
    report = check(model(), objective, batch())
    assert report.truncation[report.mu] <= 1e-2
    assert all(error > 1e-2 for mu, error in report.truncation.items() if mu > report.mu)


def test_the_plan_prints_every_parameter() -> None:
    from deepzero.estimators import CGE

    text = str(CGE(model(), objective).plan(batch()))
    for name, p in model().named_parameters():
        assert name in text
        assert f"{p.numel()}" in text
    assert f"{1 + sum(p.numel() for p in model().parameters())} queries an estimate in float32" in text


def test_the_plan_counts_the_memory_of_a_value_once_however_it_is_viewed() -> None:
    from deepzero.estimators import CGE

    model, x = nn.Linear(6, 8), torch.randn(5, 6)

    def plain(m: nn.Module, b: torch.Tensor) -> torch.Tensor:
        return m(b).square().sum()

    def viewed(m: nn.Module, b: torch.Tensor) -> torch.Tensor:
        left, right = m(b).view(5, 2, 4).transpose(0, 1).unbind()
        return torch.cat([left.unsqueeze(0), right[None]]).square().sum()

    def joined(m: nn.Module, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([m(b)]).square().sum()

    sizes = [CGE(model, f).plan(x).lines[0].bytes for f in (plain, joined, viewed)]
    assert sizes[0] <= sizes[1] == sizes[2]


def test_the_plan_names_the_kernel_of_each_region_and_its_share() -> None:
    from deepzero.estimators import CGE

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2)
    )
    plan = CGE(net, lambda m, b: (m(b) - 1).pow(3).sum()).plan(torch.randn(4, 1, 8, 8))
    fused = {name for name in plan.kernels if not name.startswith("rule ")}
    assert fused == {
        "conv2d+batch_norm+relu+pool (OneChannel)",
        "conv2d+batch_norm (Dense)",
        "conv2d+batch_norm (OneChannel)",
        "batch_norm+relu+pool (OneChannel)",  # of its own weight and bias
        "batch_norm (OneChannel)",
    }
    assert any(name.startswith("rule convolution") for name in plan.kernels)
    assert 0 < sum(plan.kernels.values()) <= plan.seconds * (1 + 1e-9)
    assert "batch_norm+relu+pool (OneChannel)" in str(plan)


def test_the_plan_names_the_kernels_of_a_transformer_block() -> None:
    from deepzero.estimators import CGE

    net = vit(image_size=4, patch=2, blocks=2, width=4, heads=2)
    plan = CGE(net, lambda m, b: m(b).square().sum()).plan(torch.randn(2, 3, 4, 4))
    fused = {name for name in plan.kernels if not name.startswith("rule ")}
    assert fused == {
        "layer_norm+linear+attention+linear+residual (Dense)",
        "layer_norm+linear+gelu+linear+residual (Dense)",
    }


def test_where_attention_has_no_kernel_the_linear_layers_around_it_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no backend has that kernel."""
    from deepzero.estimators import CGE
    from deepzero.fusion import policy

    monkeypatch.setattr(policy, "has_fused_kernel", lambda op, device: op != "self_attention_difference")
    net = vit(image_size=4, patch=2, blocks=2, width=4, heads=2)
    engine = CGE(net, lambda m, b: m(b).square().sum()).engine
    with engine.prepared(torch.randn(2, 3, 4, 4)) as ready:
        assert ready.base is not None
        steps = engine.planner.route(ready.base, next(name for name, _ in net.named_parameters())).steps
    fused = [step.kernel for step in steps if "linear" in step.kernel]
    block = ["layer_norm+linear", "linear+residual", "layer_norm+linear+gelu+linear+residual"]
    assert fused[:6] == 2 * block
