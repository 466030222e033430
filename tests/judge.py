"""What an estimate is compared with, and by which rule. Proved to fail when it should in test_judge.py.

The references share nothing with the engine: they run the model itself, on a float64 deep copy, with floats that the
code casts or creates on the way promoted too (a model's own ``.to(torch.float32)`` would else cap the reference).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepzero import CGE, RGE
from deepzero.objective import Mask, Objective

MUS = (1e-1, 1e-2, 5e-3, 1e-4, 1e-6, 1e-8)
PLAIN_MU = 1e-4  # the smallest step at which a plain float64 quotient is a reference: its noise is about 1e-16 / mu

FLOAT32, FLOAT32_TINY, BFLOAT16 = 1e-5, 5e-5, 2e-2


def tolerance(precision: str, mu: float) -> float:
    """The project's bar for the error of the quotients against quotients with the same step."""
    return BFLOAT16 if precision == "bfloat16" else FLOAT32 if mu >= 1e-6 else FLOAT32_TINY


# --- the rule


@dataclass(frozen=True)
class Verdict:
    """How far an estimate is from a reference.

    error   largest |err_t| / (|q_t| + 1e-2 |q_model| / sqrt(tensors)) over the parameter tensors t
    worst   name of that tensor
    angle   between the two whole vectors; about sqrt(2 - 2 cosine), without its cancellation
    """

    error: float
    worst: str
    angle: float

    def faults(self, tol: float) -> list[str]:
        """What is wrong unless every tensor is within ``tol`` and so is the angle. NaN is wrong."""
        found = []
        if not self.error <= tol:
            found.append(f"{self.worst} is {self.error:.3g} off by the rule; allowed {tol:g}")
        if not self.angle <= tol:
            found.append(f"the whole vector is turned by {self.angle:.3g}; allowed {tol:g}")
        return found

    def check(self, tol: float) -> None:
        """AssertionError if there is a fault."""
        found = self.faults(tol)
        assert not found, "; ".join(found)


def judge(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], noise: float = 0.0) -> Verdict:
    """Per parameter tensor: |err_t| <= tol |q_t| + tol 1e-2 |q_model| / sqrt(tensors), for the tol of the verdict.

    ``noise`` is the reference's own in one quotient: as much of an error is not counted.
    """
    assert got.keys() == wanted.keys(), f"tensors differ: {sorted(got.keys() ^ wanted.keys())}"
    assert wanted, "nothing to judge"
    for name, q in wanted.items():
        assert got[name].shape == q.shape, f"{name}: shape {list(got[name].shape)}, wanted {list(q.shape)}"
        assert bool(q.isfinite().all()), f"the reference of {name} is not finite"
    flat = torch.cat([q.double().flatten() for q in wanted.values()])
    mine = torch.cat([got[name].double().flatten() for name in wanted])
    slack = 1e-2 * float(flat.norm()) / math.sqrt(len(wanted))
    error, worst = 0.0, ""
    for name, q in wanted.items():
        off, scale = float((got[name].double() - q.double()).norm()), float(q.double().norm()) + slack
        ratio = _ratio(off, noise * math.sqrt(q.numel()), scale)
        if not ratio <= error:
            error, worst = ratio, name
            if math.isnan(ratio):
                break
    a, b = float(mine.norm()), float(flat.norm())
    turned = float((mine / a - flat / b).norm()) if a > 0 and b > 0 else (0.0 if a == b else math.nan)
    noisy = noise * math.sqrt(flat.numel())
    angle = 0.0 if float((mine - flat).norm()) <= noisy else _ratio(turned, noisy / b if b > 0 else 0.0, 1.0)
    return Verdict(error, worst, angle)


def _ratio(off: float, allowed: float, scale: float) -> float:
    """What ``off`` has beyond ``allowed``, in units of ``scale``; NaN if it is NaN."""
    if off <= allowed:
        return 0.0
    return (off - allowed) / scale if scale > 0 else math.inf if off == off else math.nan


# --- references


def restored(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Random state and the model's buffers are as before afterwards, so that every call starts alike."""

    @contextlib.contextmanager
    def keep() -> Iterator[None]:
        buffers = [(b, b.detach().clone()) for b in model.buffers()]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
            for buffer, before in buffers:
                buffer.copy_(before)

    return keep()


class Promoted(TorchDispatchMode):
    """Every narrower floating dtype or tensor that reaches an op becomes float64.

    ``drawn`` is the dtype in which the model at hand draws its random numbers: torch.rand gives other numbers in
    float64, and the reference is of the same draw.
    """

    def __init__(self, drawn: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.drawn = drawn

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(self._wide, (args, kwargs or {}))
        if func in (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default):
            args = (*args[:2], False)
        if torch.Tag.nondeterministic_seeded in func.tags and ("dtype" in kwargs or "_like" in str(func)):
            kwargs = {**kwargs, "dtype": self.drawn}
        return pytree.tree_map(self._wide, func(*args, **kwargs))

    @staticmethod
    def _wide(value: Any) -> Any:
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64:
            return value.double()
        return value


def double_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters())


def double_batch(batch: Any) -> Any:
    return pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, batch)


def quotients(
    parameters: Mapping[str, Tensor], loss: Callable[[], float], mask: Mask, mu: float
) -> tuple[dict[str, Tensor], float]:
    """(L(w + mu e_i) - L(w)) / mu, one whole loss a coordinate and zero where the mask is False; and L(w)."""
    base, out = loss(), {}
    with torch.no_grad():
        for name, chosen in mask.items():
            parameter = parameters[name]
            out[name] = torch.zeros_like(parameter, requires_grad=False)
            for at in map(tuple, chosen.nonzero().tolist()):
                before = parameter[at].clone()
                parameter[at] = before + mu
                out[name][at] = (loss() - base) / mu
                parameter[at] = before
    return out, base


def plain_quotients(model: nn.Module, objective: Objective, batch: Any, mask: Mask, mu: float) -> dict[str, Tensor]:
    """(L(w + mu e_i) - L(w)) / mu in float64, one full forward a coordinate. Zero where the mask is False."""
    twin, data = double_copy(model), double_batch(batch)
    parameters = dict(twin.named_parameters())

    def loss() -> float:
        with restored(twin), Promoted(dtype_of(model)):
            return float(objective(twin, data))

    return quotients(parameters, loss, mask, mu)[0]


def autograd(model: nn.Module, objective: Objective, batch: Any, mask: Mask | None = None) -> dict[str, Tensor]:
    """The gradient of the float64 copy, of trainable parameters; those that do not reach the loss have zeros."""
    twin, data = double_copy(model), double_batch(batch)
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad and (mask is None or name in mask)}
    with restored(twin), Promoted(dtype_of(model)), torch.enable_grad():
        loss = objective(twin, data)
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    found = dict(zip(parameters, grads, strict=True))
    return found if mask is None else {name: g * mask[name] for name, g in found.items()}


# --- estimates, before they are rounded to the parameter's dtype


class WideCGE(CGE):
    """CGE whose gradients stay float64: a bfloat16 weight's ``.grad`` would hide everything below 2e-3."""

    def _empty_grads(self, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: g.double() for name, g in super()._empty_grads(selected).items()}


class WideRGE(RGE):
    """RGE whose gradients stay float64."""

    def _empty_grads(self, selected: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: g.double() for name, g in super()._empty_grads(selected).items()}


def ours(
    model: nn.Module, objective: Objective, batch: Any, mask: Mask, mu: float, precision: str = "float32"
) -> dict[str, Tensor]:
    """The engine's quotients; no op may fall back."""
    return WideCGE(model, objective, mu=mu, precision=precision, strict=True).estimate(batch, mask).grads


def reference(model: nn.Module, objective: Objective, batch: Any, mask: Mask, mu: float) -> dict[str, Tensor]:
    """Quotients with the same step: plain float64 where its noise allows, else differences propagated in float64.

    test_models.py checks the second against the first at larger steps, and against 50 digits at small ones.
    """
    if mu >= PLAIN_MU:
        return plain_quotients(model, objective, batch, mask, mu)
    return ours(model, objective, batch, mask, mu, "float64")


def sampled(model: nn.Module, objective: Objective, batch: Any, each: int) -> dict[str, Tensor]:
    """A mask over every parameter tensor: ``each`` random coordinates, and the one with the largest gradient, so
    that no tensor is judged on dead weights only (an embedding's unused rows)."""
    generator = torch.Generator().manual_seed(0)
    mask = {}
    for name, gradient in autograd(model, objective, batch).items():
        chosen = torch.zeros(gradient.numel(), dtype=torch.bool)
        chosen[torch.randperm(gradient.numel(), generator=generator)[:each]] = True
        chosen[gradient.abs().argmax()] = True
        mask[name] = chosen.reshape(gradient.shape)
    return mask
