"""Regions are found by the fields of their dataclass: order, what may be missing, who reads what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from deepzero.engine import Engine
from deepzero.fusion import Region
from deepzero.fusion.attention import _source
from deepzero.fusion.convolution import ConvolutionNormRegion
from deepzero.fusion.linear import LinearRegion, MlpRegion
from deepzero.fusion.norm import NormRegion
from deepzero.fusion.region import ahead, closed, only_if
from deepzero.graph.nodes import Convolution, ImageMean, Linear, Relu, Residual, SquarePool, aten
from deepzero.plan.route import reach


def nodes_of(model: nn.Module, *shape: int) -> list[fx.Node]:
    engine = Engine(model, lambda m, x: m(x).square().mean(), precision="float32", strict=True, block=None)
    with engine.prepared(torch.randn(shape, generator=torch.Generator().manual_seed(0))) as ready:
        assert ready.base is not None
        return list(reach(ready.base.graph, [name for name, _ in model.named_parameters()]))


Found = TypeVar("Found", bound=Region)


def first(kind: type[Found], nodes: list[fx.Node]) -> Found | None:
    return next((found for node in nodes if (found := kind.at(node, set(nodes))) is not None), None)


def conv(width: int = 2) -> nn.Conv2d:
    return nn.Conv2d(2, width, 3, padding=1)


class Block(nn.Module):
    """conv, norm, then a sum with the input, ReLU, and what ``after`` is."""

    def __init__(self, after: nn.Module, *, twice: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.after, self.twice = conv(), nn.BatchNorm2d(2), after, twice

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        y = self.after(F.relu(z + x))
        return y + z if self.twice else y


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(conv(), nn.BatchNorm2d(2)), "batch_norm"),
        (nn.Sequential(conv(), nn.BatchNorm2d(2), nn.ReLU()), "batch_norm+relu"),
        (nn.Sequential(conv(), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)), "batch_norm+relu+pool"),
        (nn.Sequential(conv(), nn.BatchNorm2d(2), nn.MaxPool2d(2)), "batch_norm"),  # a pool only after a ReLU
        (nn.Sequential(conv(), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(3, 2)), "batch_norm+relu"),
        (nn.Sequential(conv(), nn.BatchNorm2d(2), nn.Sigmoid(), nn.ReLU()), "batch_norm"),
        (Block(nn.Identity()), "batch_norm+residual+relu"),
        (Block(nn.MaxPool2d(2)), "batch_norm+residual+relu+pool"),
        (Block(nn.Identity(), twice=True), "batch_norm"),  # the sum is not the norm's only reader
        (nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(2)), None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_norms(model: nn.Module, name: str | None) -> None:
    found = first(NormRegion, nodes_of(model.train(), 3, 2, 6, 6))
    assert (found.name if found is not None else None) == name
    if found is not None:
        assert found.window == (2 if "pool" in found.name else 1)
        assert closed(found.nodes)
        assert (found.added is not None) == ("residual" in found.name)


@pytest.mark.parametrize(("size", "mean"), [(6, True), (64, False)])
def test_the_mean_of_large_images_stays_outside(size: int, mean: bool) -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).train()
    found = first(ConvolutionNormRegion, nodes_of(model, 2, 2, size, size))
    assert found is not None
    assert found.name == "conv2d+batch_norm+relu" + ("+mean" if mean else "")
    assert (found.mean is not None) == mean


def test_linear_layers() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))

    nodes = nodes_of(nn.Sequential(nn.Linear(4, 4), Mlp()), 2, 3, 4)
    found = first(MlpRegion, nodes)
    assert found is not None
    assert found.name == "layer_norm+linear+gelu+linear+residual"
    assert (found.gelu.approximate, found.residual is not None) == ("tanh", True)
    half = first(LinearRegion, nodes)
    assert half is not None
    assert half.name == "layer_norm+linear"
    assert half.residual is None


def test_what_lies_ahead_stays_outside() -> None:
    @dataclass(frozen=True)
    class Peek(Region):
        conv: Convolution
        relu: Relu | None = field(metadata=ahead(lambda relu: True))

    @dataclass(frozen=True)
    class Never(Region):
        conv: Convolution
        relu: Relu | None = field(metadata=ahead(lambda relu: False))

    @dataclass(frozen=True)
    class Taken(Region):
        conv: Convolution
        relu: Relu | None = field(metadata=only_if(lambda found: found["conv"].groups == 2))

    nodes = nodes_of(nn.Sequential(conv(), nn.ReLU()), 2, 2, 6, 6)
    peek, never, taken = (first(kind, nodes) for kind in (Peek, Never, Taken))
    assert peek is not None and never is not None and taken is not None
    assert [len(region.nodes) for region in (peek, never, taken)] == [1, 1, 1]
    assert (peek.name, never.name, taken.name) == ("conv2d+relu", "conv2d", "conv2d")


def test_a_weight_that_is_a_value_of_the_region_is_not_closed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            return F.linear(z, z)

    nodes = [n for n in nodes_of(Tied(), 4, 4) if Linear.of(n) is not None]
    assert len(nodes) == 2
    assert closed(nodes[:1]) and not closed(nodes)


def test_views_read_arguments_by_name() -> None:
    nodes = nodes_of(nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU()), 2, 2, 6, 6)
    found = next(view for node in nodes if (view := Convolution.of(node)) is not None)
    assert (found.stride, found.padding, found.dilation, found.groups) == ([2, 2], [1, 1], [1, 1], 2)
    assert not found.transposed
    relu = next(node for node in nodes if Relu.of(node) is not None)
    assert Relu.after(found.node, relu) is not None
    assert Relu.after(relu, relu) is None
    assert all(kind.of(relu) is None for kind in (Linear, ImageMean, SquarePool, Convolution))
    assert Residual.after(found.node, relu) is None


Steps = list[tuple[Any, list[Any]]]

HEADS: Steps = [(aten.view.default, [[2, 3, 2, 4]]), (aten.transpose.int, [1, 2])]


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        (HEADS, True),
        ([(aten.unsqueeze.default, [0]), (aten.squeeze.dims, [[0]]), *HEADS], True),
        ([(aten.transpose.int, [0, 1]), (aten.reshape.default, [[2, 3, 2, 4]]), (aten.transpose.int, [1, 2])], False),
        ([(aten.view.default, [[2, 3, 2, 4]]), (aten.clone.default, []), (aten.transpose.int, [1, 2])], False),
        ([(aten.tanh.default, []), *HEADS], False),
    ],
    ids=["heads", "a dimension in between", "a view that copies", "a copy", "no view"],
)
def test_features_of_a_linear_layer_through_views(steps: Steps, found: bool) -> None:
    """What reaches an attention as [N, H, T, D] is told from the layer's features [N, T, H D] by its strides."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    node = graph.call_function(aten.linear.default, (x, w))
    node.meta["val"] = torch.empty(2, 3, 8, device="meta")
    for op, rest in steps:
        node = graph.call_function(op, (node, *rest))
    source = _source(node)
    assert (source is not None) == found
    if source is not None:
        assert source.features.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert len(source.views) == len(steps)
