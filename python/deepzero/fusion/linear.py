"""Linear layers of a transformer: (layer norm +) linear (+ GELU + linear) (+ residual)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

import dzkernels

from ..carriers import Carrier, Dense, Zero, dense
from ..graph.nodes import Gelu, LayerNorm, Linear, Residual
from ..rules.norm import layer_base
from . import policy
from .pattern import Pattern, constant
from .region import Region

if TYPE_CHECKING:
    from ..block import Block


def over_rows(norm: LayerNorm | None) -> bool:
    """Whether the norm, if there is one, normalises the last dimension alone."""
    return norm is None or len(norm.shape) == 1


def weights(*layers: Linear) -> int:
    return sum(layer.weight.meta["val"].numel() for layer in layers)


@dataclass(frozen=True)
class MlpRegion(Region):
    norm: LayerNorm | None
    up: Linear
    gelu: Gelu
    down: Linear
    residual: Residual | None

    def fits(self, inside: Collection[fx.Node]) -> bool:
        return over_rows(self.norm) and weights(self.up, self.down) <= policy.L2_VALUES


@dataclass(frozen=True)
class LinearRegion(Region):
    norm: LayerNorm | None
    layer: Linear
    residual: Residual | None

    def fits(self, inside: Collection[fx.Node]) -> bool:
        more = self.norm is not None or self.residual is not None
        return more and over_rows(self.norm) and 0 < weights(self.layer) <= policy.L2_VALUES


def takes(block: Block, op: str, norm: LayerNorm | None, *layers: Linear) -> bool:
    """Whether the input of the layers moves, and nothing else of them, in the kernels' dtype and on such a device."""
    d = block.raw((norm or layers[0]).input)
    given = [arg for layer in layers for arg in (layer.weight, layer.bias)]
    given += [norm.weight, norm.bias] if norm is not None else []
    if d is Zero or not constant(block, *given) or block.dtype is not torch.float32:
        return False
    device = block.exact(layers[0].node).device
    return policy.has_fused_kernel(op, device) and (norm is not None or isinstance(d, Dense))


def _rows(block: Block, carrier: Carrier) -> Tensor:
    """[P, R, width], R all dimensions but the last."""
    values = dense(carrier)
    values = values.to(block.dtype) if values.dtype is torch.float64 else values
    return values.reshape(block.count, -1, values.shape[-1])


def input_and_residual(
    block: Block, first: LayerNorm | Linear, residual: Residual | None
) -> tuple[Tensor, Tensor | None]:
    """Rows of the differences of the first node's input and of the residual, which may be the same."""
    d, extra = block.raw(first.input), block.raw(None if residual is None else residual.other)
    values = _rows(block, d)
    return values, None if extra is Zero else values if extra is d else _rows(block, extra)


def row_norm(block: Block, norm: LayerNorm | None) -> dzkernels.RowNorm | None:
    if norm is None:
        return None
    zc, var, _ = layer_base(block, norm)
    gamma = None if norm.weight is None else block.low(norm.weight)
    return dzkernels.RowNorm(zc.reshape(-1, zc.shape[-1]), var.reshape(-1), gamma, norm.eps)


def launch_mlp(block: Block, region: MlpRegion) -> Carrier | None:
    norm, up, down = region.norm, region.up, region.down
    if not takes(block, "mlp_difference", norm, up, down):
        return None
    values, extra = input_and_residual(block, norm or up, region.residual)
    z, shape = block.low(up.node), tuple(block.exact(down.node).shape)
    out = dzkernels.mlp_difference(
        values, block.low(up.weight), z.reshape(-1, z.shape[-1]), block.low(down.weight), extra, row_norm(block, norm),
        approximate=region.gelu.approximate, operands=block.operands,
        out_dtype=block.operands if extra is None else block.dtype,
    )  # fmt: skip
    return Dense(out.reshape(block.count, *shape))


def launch_linear(block: Block, region: LinearRegion) -> Carrier | None:
    norm, layer = region.norm, region.layer
    if not takes(block, "linear_difference", norm, layer):
        return None
    half = block.operands is torch.bfloat16 and block.exact(layer.node).device.type == "cpu"
    residual_moves = region.residual is not None and not constant(block, region.residual.other)
    if not residual_moves and (norm is None or half):
        return None  # rounding the result to bfloat16 takes the CPU's kernel longer than a way through memory
    values, extra = input_and_residual(block, norm or layer, region.residual)
    out = dzkernels.linear_difference(
        values, block.low(layer.weight), extra, row_norm(block, norm), operands=block.operands,
        out_dtype=block.operands if extra is None else block.dtype,
    )  # fmt: skip
    return Dense(out.reshape(block.count, *block.exact(layer.node).shape))


MLP = Pattern("mlp", MlpRegion, launch_mlp)
LINEAR = Pattern("linear", LinearRegion, launch_linear)
