from __future__ import annotations

import torch
from torch import Tensor

from . import softmax_difference


def run(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, q: Tensor, k: Tensor, v: Tensor, p: Tensor, *,
    scale: float, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    probs, transposed = p.double(), k.double().mT
    scores, out = [], []
    if dq is not None:
        scores.append(dq.double() @ transposed)
    if dk is not None:
        scores.append((q.double() if dq is None else q.double() + dq.double()) @ dk.double().mT)
    if scores:
        moved = scale * sum(scores[1:], scores[0])
        rows = (p.shape[:-1].numel(), p.shape[-1])
        flat = softmax_difference.run(moved.reshape(len(moved), *rows), probs.reshape(rows), log=False)
        change = flat.view(moved.shape)
        out.append(change @ v.double())
        probs = probs + change
    if dv is not None:
        out.append(probs @ dv.double())
    result = sum(out[1:], out[0]).to(out_dtype)
    return result.transpose(-3, -2).contiguous().transpose(-3, -2) if q.dim() == 4 else result.contiguous()
