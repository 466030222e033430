from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._op import INT64, LEAD, LIKE, Arg, Kernel, Op

OP = Op(
    __name__,
    Arg("delta", "P, N", LEAD),
    Arg("channel", "P", INT64, below="C", what="columns of weight"),
    Arg("weight", "K, C", LIKE),
    Arg("log_probs", "N, K", (torch.float64, torch.float32), filled="N and K"),
    Arg("target", "N", INT64, below="K", what="classes"),
    cpu=Kernel(),
    triton=Kernel(),
)


def channel_linear_cross_entropy(
    delta: Tensor, channel: Tensor, weight: Tensor, log_probs: Tensor, target: Tensor
) -> Tensor:
    """Change of the mean cross-entropy when one input feature of the last linear layer is perturbed.

    out = cross_entropy_difference(log_probs, target, dlogits)
    with dlogits[p, n, k] = delta[p, n] * weight[k, channel[p]], which is neither stored nor rounded

    delta      [P, N]                      difference of feature channel[p]
    channel    [P] int64                   0 .. C - 1
    weight     [K, C]                      of the linear layer, dtype of delta
    log_probs  [N, K] float64 or float32   log-softmax of the base logits
    target     [N] int64                   class of each sample
    result     [P] float64

    Exactness: float64 throughout; small changes do not cancel and large ones do not overflow.
    Cost: one product and one expm1 per perturbation, sample and class.
    """
    OP(delta, channel, weight, log_probs, target)
    return backends.run(OP.name, delta, delta, channel, weight, log_probs.to(torch.float64), target)
