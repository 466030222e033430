from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._op import INT64, LEAD, Arg, Kernel, Op

OP = Op(
    __name__,
    Arg("log_probs", "N, K", (torch.float64, torch.float32), filled="N and K"),
    Arg("target", "N", INT64, below="K", what="classes"),
    Arg("dlogits", "P, N, K", LEAD),
    cpu=Kernel(),
    triton=Kernel(),
    cuda=Kernel(),
)


def cross_entropy_difference(log_probs: Tensor, target: Tensor, dlogits: Tensor) -> Tensor:
    """Change of the mean cross-entropy when the logits are perturbed.

    out[p] = mean_n(log(sum_k p[n, k] exp(d[k])) - d[target[n]]), d = dlogits[p, n], p = exp(log_probs)
    computed as log1p(sum_k p[n, k] expm1(d[k] - d[target[n]])), which holds because each row of p sums to 1

    log_probs  [N, K] float64 or float32   log-softmax of the base logits
    target     [N] int64                   class of each sample
    dlogits    [P, N, K]                   change of the logits
    result     [P] float64

    Exactness: float64 throughout; small changes do not cancel and large ones do not overflow.
    """
    OP(log_probs, target, dlogits)
    return backends.run(OP.name, dlogits, log_probs.to(torch.float64), target, dlogits)
