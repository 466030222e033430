"""Typed views of nodes: what the positions of an op's arguments mean, decoded in one place.

``BatchNorm.of(node)`` is None for any other node. Rules read their arguments by these names, and the patterns of
``fusion/`` are sequences of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import Self

aten = torch.ops.aten


def _arguments(node: fx.Node) -> Any:
    """The positional arguments; the op's schema fixes their number and kinds."""
    return node.args


@dataclass(frozen=True)
class View:
    """One node, by the names of its arguments.

    label  what a fusion group that contains it is called
    """

    label: ClassVar[str]
    node: fx.Node

    @classmethod
    def of(cls, node: fx.Node) -> Self | None:
        """The view of ``node``, None for another op; and where an op has a view only after a value."""
        return None

    @classmethod
    def after(cls, value: fx.Node, node: fx.Node) -> Self | None:
        """The view of ``node`` where it works on ``value``."""
        return cls.of(node) if node.args and node.args[0] is value else None


UPDATING = (aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit.default)
"""Batch norms that take batch statistics in training and update running ones."""

_BATCH_NORMS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((*UPDATING, aten.native_batch_norm.default), ("mean", "var", "training", "momentum", "eps")),
    aten._native_batch_norm_legit.no_stats: ("training", "momentum", "eps"),
    aten._native_batch_norm_legit_no_training.default: ("mean", "var", "momentum", "eps"),
}
"""op -> its arguments after input, weight and bias."""


@dataclass(frozen=True)
class BatchNorm(View):
    """x [N, C, *spatial]; statistics of the batch in training, the running ones ``mean`` and ``var`` [C] otherwise.

    updates  in training it gives new running statistics too
    """

    label = "batch_norm"
    input: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    mean: fx.Node | None
    var: fx.Node | None
    training: bool
    eps: float
    updates: bool

    @classmethod
    def of(cls, node: fx.Node) -> Self | None:
        if node.target not in _BATCH_NORMS:
            return None
        x, weight, bias, *rest = _arguments(node)
        given: dict[str, Any] = dict(zip(_BATCH_NORMS[node.target], rest, strict=True))
        return cls(
            node, x, weight, bias, given.get("mean"), given.get("var"), bool(given.get("training", False)),
            float(given["eps"]), node.target in UPDATING,
        )  # fmt: skip

    @property
    def parameters(self) -> tuple[fx.Node | None, ...]:
        """Weight, bias and running statistics."""
        return self.weight, self.bias, self.mean, self.var


@dataclass(frozen=True)
class LayerNorm(View):
    """x [..., *shape], normalised over the dimensions of ``shape``."""

    label = "layer_norm"
    input: fx.Node
    shape: Sequence[int]
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float

    @classmethod
    def of(cls, node: fx.Node) -> Self | None:
        if node.target is not aten.native_layer_norm.default:
            return None
        x, shape, weight, bias, eps = _arguments(node)
        return cls(node, x, shape, weight, bias, float(eps))


@dataclass(frozen=True)
class Convolution(View):
    """x [N, C, *spatial] with weight [O, C / groups, *kernel], or [C, O / groups, *kernel] when transposed.

    Stride, padding, dilation and output padding have one number for each spatial dimension.
    """

    label = "conv2d"
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    @classmethod
    def of(cls, node: fx.Node) -> Self | None:
        if node.target is not aten.convolution.default:
            return None
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = _arguments(node)
        dims = x.meta["val"].dim() - 2

        def each(values: Any) -> list[int]:
            return list(values) * (dims // len(values))

        return cls(
            node, x, weight, bias, each(stride), each(padding), each(dilation), bool(transposed), each(output_padding),
            int(groups),
        )  # fmt: skip

    @property
    def spacing(self) -> dict[str, Any]:
        """What dzkernels' convolutions take of it; ``groups`` is one more."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


@dataclass(frozen=True)
class Linear(View):
    """x [..., K] with weight [M, K]."""

    label = "linear"
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @classmethod
    def of(cls, node: fx.Node) -> Self | None:
        if node.target is not aten.linear.default:
            return None
        x, weight, *bias = _arguments(node)
        return cls(node, x, weight, bias[0] if bias else None)


@dataclass(frozen=True)
class Attention(View):
    """softmax(scale q k^T + mask) v; q [..., T, D], k [..., S, D], v [..., S, E]. ``scale`` None is 1 / sqrt(D)."""

    label = "attention"
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float | None

    @classmethod
    def of(cls, node: fx.Node) -> Self | None:
        if node.target is not aten.scaled_dot_product_attention.default:
            return None
        query, key, value, mask, _, causal = (*_arguments(node), *(None, 0.0, False)[len(node.args) - 3 :])
        return cls(node, query, key, value, mask, bool(causal), node.kwargs.get("scale"))


@dataclass(frozen=True)
class Gelu(View):
    label = "gelu"
    input: fx.Node
    approximate: str

    @classmethod
    def of(cls, node: fx.Node) -> Self | None:
        if node.target is not aten.gelu.default:
            return None
        return cls(node, _arguments(node)[0], str(node.kwargs.get("approximate", "none")))


@dataclass(frozen=True)
class Relu(View):
    label = "relu"
    input: fx.Node

    @classmethod
    def of(cls, node: fx.Node) -> Self | None:
        return cls(node, _arguments(node)[0]) if node.target is aten.relu.default else None


@dataclass(frozen=True)
class Residual(View):
    """The sum of a value and another one of the same shape."""

    label = "residual"
    input: fx.Node
    other: fx.Node

    @classmethod
    def after(cls, value: fx.Node, node: fx.Node) -> Self | None:
        if node.target is not aten.add.Tensor or node.kwargs:
            return None
        a, b = _arguments(node)
        other = b if a is value else a
        if not isinstance(other, fx.Node) or other is value:
            return None
        shapes = [v.shape for n in (value, other) if isinstance(v := n.meta.get("val"), Tensor)]
        return cls(node, value, other) if len(shapes) == 2 and shapes[0] == shapes[1] else None


@dataclass(frozen=True)
class SquarePool(View):
    """k x k max pooling with stride k, and neither padding nor dilation."""

    label = "pool"
    input: fx.Node
    size: int

    @classmethod
    def of(cls, node: fx.Node) -> Self | None:
        if node.target is not aten.max_pool2d_with_indices.default:
            return None
        x, kernel, *rest = _arguments(node)
        stride, padding, dilation, ceil = [*rest, *([None] * 4)][:4]
        plain = set(padding or [0]) <= {0} and set(dilation or [1]) <= {1} and not ceil
        square = len(set(kernel)) == 1 and list(stride or kernel) == list(kernel)
        size = int(kernel[0]) if square and plain else 0
        return cls(node, x, size) if size > 1 else None


@dataclass(frozen=True)
class ImageMean(View):
    """The mean of each channel of each image [N, C, H, W], and of nothing else."""

    label = "mean"
    input: fx.Node

    @classmethod
    def of(cls, node: fx.Node) -> Self | None:
        if node.target is not aten.mean.dim or node.kwargs:
            return None
        x, dims, *_ = _arguments(node)
        images = x.meta["val"].dim() == 4 and {dim % 4 for dim in dims or ()} == {2, 3}
        return cls(node, x) if images else None


@dataclass(frozen=True)
class CrossEntropy(View):
    label = "cross_entropy"
    input: fx.Node
    others: tuple[Any, ...]
    """Target, and what else is given: class weights, reduction, ignored label, smoothing."""

    @classmethod
    def of(cls, node: fx.Node) -> Self | None:
        if node.target is not aten.cross_entropy_loss.default:
            return None
        return cls(node, _arguments(node)[0], node.args[1:])
