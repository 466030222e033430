"""Everything a user can see of a model and the process, and the assertion that it stayed."""

from __future__ import annotations

import random
import signal
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a user can see of the model and the process, by value and by identity."""
    state: dict[str, Any] = {f"value {k}": v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()}
    state |= {f"identity {k}": id(v) for k, v in model.state_dict(keep_vars=True).items()}
    state |= {f"requires_grad {k}": p.requires_grad for k, p in model.named_parameters()}
    state |= {f"grad {k}": None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
    for name, module in model.named_modules():
        state[f"training {name}"] = module.training
        state[f"hooks {name}"] = (tuple(module._forward_hooks), tuple(module._forward_pre_hooks))
        state[f"attributes {name}"] = sorted(vars(module))
    state["torch rng"] = torch.get_rng_state()
    state["numpy rng"] = np.random.get_state()[1]
    state["python rng"] = random.getstate()
    state["sigint"] = signal.getsignal(signal.SIGINT)
    state["grad mode"] = torch.is_grad_enabled()
    return state


def assert_same(before: dict[str, Any], after: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key.startswith(but) and but:
            continue
        if isinstance(value, Tensor):
            assert torch.equal(value, after[key]), key
        elif isinstance(value, np.ndarray):
            assert np.array_equal(value, after[key]), key
        else:
            assert value == after[key], key
