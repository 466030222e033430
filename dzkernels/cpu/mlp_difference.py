from __future__ import annotations

import torch
from torch import Tensor

from .._load import native


def mlp_difference(
    delta: Tensor, up: Tensor, z: Tensor, down: Tensor, residual: Tensor | None, *,
    approximate: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    delta, up, z, down = (t.contiguous() for t in (delta, up, z, down))
    residual = None if residual is None else residual.contiguous()
    inner = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    out = torch.empty(*delta.shape[:2], len(down), dtype=inner, device="cpu")
    native().mlp_difference(
        delta.data_ptr(), up.data_ptr(), z.data_ptr(), down.data_ptr(),
        0 if residual is None else residual.data_ptr(), out.data_ptr(), *delta.shape, *down.T.shape,
        approximate == "tanh", delta.dtype == torch.bfloat16,
        residual is not None and residual.dtype == torch.bfloat16, inner == torch.bfloat16,
    )  # fmt: skip
    return out.to(out_dtype)
