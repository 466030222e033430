from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._norm import RowNorm
from . import layer_norm_difference
from ._config import Config, launch
from ._linear import (
    add_product,
    block_of,
    constants,
    load_rows,
    norm_arguments,
    operand_dtype,
    parts_of,
    store_rows,
    tile_rows,
)


@triton.jit
def _kernel(
    delta, zc, var, gamma, weight, residual, out, P, R, K, M, groups, span, EPS: tl.constexpr, TOGETHER: tl.constexpr,
    UPCAST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """`span` columns of the result for a tile of rows, OUTS at a time. The rows are read and normalised once and stay
    in registers. PARTS = 0: they are too long for that, are already normalised, and are read block by block."""
    piece = tl.program_id(0).to(tl.int64)  # groups of columns vary fastest: they share rows
    q, r, inside = tile_rows(piece // groups, P, R, TOGETHER, ROWS)
    first = (piece % groups).to(tl.int32) * span
    if PARTS > 0:
        left = load_rows(delta, zc, var, gamma, q, r, inside, K, weight.dtype.element_ty, EPS, PARTS, BLOCK)
    for start in range(first, min(first + span, M), OUTS):
        o = start + tl.arange(0, OUTS)
        total = tl.zeros((ROWS, OUTS), dtype=tl.float32)
        if PARTS > 0:
            for i in tl.static_range(PARTS):
                total = add_product(total, left[i], weight, o, i * BLOCK + tl.arange(0, BLOCK), M, K, UPCAST)
        else:
            for begin in range(0, K, BLOCK):
                k = begin + tl.arange(0, BLOCK)
                d = tl.load(delta + q[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
                total = add_product(total, d.to(weight.dtype.element_ty), weight, o, k, M, K, UPCAST)
        store_rows(out, residual, total, q, inside, o, M)


def run(
    delta: Tensor, weight: Tensor, residual: Tensor | None, norm: RowNorm | None, *,
    operands: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    perturbations, rows, width = delta.shape
    outs, dtype = len(weight), operand_dtype(operands)
    out = torch.empty(perturbations, rows, outs, dtype=out_dtype, device=delta.device)
    if out.numel() > 0:
        parts, block = parts_of(width, dtype)
        if norm is not None and parts == 0:
            delta = layer_norm_difference.run(delta, *norm[:3], eps=norm.eps, centre=True, out_dtype=dtype)
            norm = None
        delta, weight = delta.contiguous(), weight.to(dtype).contiguous()
        residual = None if residual is None else residual.contiguous()
        fixed = constants(norm, perturbations)

        def start(config: Config) -> None:
            together, across = fixed["TOGETHER"], config["OUTS"]
            tiles = triton.cdiv(perturbations, together) * triton.cdiv(rows, config["ROWS"] // together)
            # A program computes all columns of its rows if there are enough tiles to occupy a large GPU.
            groups = min(triton.cdiv(outs, across), max(1, 512 // tiles) if parts else outs)
            span = triton.cdiv(triton.cdiv(outs, groups), across) * across
            groups = triton.cdiv(outs, span)
            _kernel[(tiles * groups,)](
                delta, *norm_arguments(norm), weight, residual, out, perturbations, rows, width, outs, groups, span,
                PARTS=parts, BLOCK=block, **fixed, **config,
            )  # fmt: skip

        # Not tuned: BLOCK, on which the order of the sum depends, and numbers of rows that select other instructions.
        across, half = min(64, block_of(outs)), dtype == torch.bfloat16
        down, warps = (64, 8) if half or not parts else (32, 4)
        configs = [{"ROWS": down, "OUTS": across, "num_warps": warps, "num_stages": stages} for stages in (2, 3)]
        if half:
            configs.append({"ROWS": 128, "OUTS": across, "num_warps": 8, "num_stages": 2})
        kinds = (delta.dtype, dtype, out_dtype, norm is not None, None if residual is None else residual.dtype)
        launch(__name__, (perturbations, rows, width, outs, *kinds), configs, start)
    return out
