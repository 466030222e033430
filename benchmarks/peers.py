"""The contenders. Each answers the same two questions: its quotients on the sample, and its time per query
(:func:`machine.spent`).

A peer's time per query is the mean over the parameters of the mask, weighted by how many of its coordinates each has;
within a parameter every sampled coordinate counts alike. Work done once per estimate counts once per estimate.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from deepzero import CGE, RGE
from deepzero.estimators.directions import DISTRIBUTIONS

from .cases import DIRECTIONS, MU, Case, Group, every, mask_of, objective
from .machine import spent


class Contender(ABC):
    """How one method does one work.

    context   computes derivatives, not quotients: a line for comparison, never judged
    layout    its tuned row gets model and images in channels-last memory
    queries   perturbed losses that one :meth:`round` really evaluates
    how       which coordinates those are
    """

    context = False
    layout = True
    queries = 0
    how = ""

    def __init__(self, case: Case, groups: Sequence[Group]) -> None:
        self.case, self.groups = case, list(groups)

    def seconds(self, function: Callable[[], Any]) -> float:
        """The time of one call, as :func:`machine.spent` takes it."""
        return spent(function, self.case.device)

    @abstractmethod
    def first(self) -> None:
        """The smallest useful call, whose first run pays for capture and warm-up."""

    def settle(self, seconds: float) -> None:  # noqa: B027
        """Choose what a round measures, so that it takes about ``seconds``; by default the sample."""

    @abstractmethod
    def quotients(self) -> dict[str, Tensor]:
        """Parameter name -> quotients [s] on the sampled coordinates; parameters may be left out."""

    @abstractmethod
    def round(self) -> float:
        """Seconds per query."""


# --- ours


class Ours(Contender):
    layout = False  # the engine lays out its own values
    precision = "float32"

    def __init__(self, case: Case, groups: Sequence[Group]) -> None:
        super().__init__(case, groups)
        self.estimator = CGE(case.model, objective, mu=MU, precision=self.precision)
        self.one = mask_of(case, [replace(groups[-1], where=groups[-1].where[:1])])
        self.measured, self.whole = case.mask, True

    def first(self) -> None:
        self._estimate(self.one)

    def quotients(self) -> dict[str, Tensor]:
        grads = self._estimate(mask_of(self.case, self.groups))
        return {g.name: grads[g.name][tuple(g.where.unbind(1))].double() for g in self.groups}

    def settle(self, seconds: float) -> None:
        base, stride = self.seconds(self.first), 64
        while stride > 1:
            above = self.seconds(lambda k=stride: self._estimate(every(self.case, k))) - base  # type: ignore[misc]
            if base + 4 * above > seconds:  # blocks fill up as the mask grows: this is too much rather than too little
                break
            stride //= 4
        self.measured, self.whole = (every(self.case, stride), False) if stride > 1 else (self.case.mask, True)
        self.queries = sum(int(m.sum()) for m in self.measured.values())
        self.how = "whole mask" if self.whole else f"every {stride}th coordinate of the mask"

    def _estimate(self, mask: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.estimator.estimate(self.case.batch, mask).grads

    def round(self) -> float:
        total = self.seconds(lambda: self._estimate(self.measured))
        if self.whole:
            return total / (self.queries + 1)
        base = self.seconds(self.first)
        above = max(total - base, 0.0)  # two times of a noisy machine: the longer work may come out shorter
        return above / self.queries + base / self.case.count


class OursHalf(Ours):
    precision = "bfloat16"


# --- finite differences by whole or partial forward passes


class Loop(Contender):
    """Perturb one weight, run the model, restore the weight."""

    def __init__(self, case: Case, groups: Sequence[Group]) -> None:
        super().__init__(case, groups)
        self.parameters = dict(case.model.named_parameters())
        self.queries = sum(len(g.where) for g in self.groups)
        self.how = "stratified sample"

    def _memory(self, name: str) -> Tensor:
        """A parameter as it lies in memory, one-dimensional; writing to it writes the weight."""
        data = self.parameters[name].data
        return data.as_strided((data.numel(),), (1,), data.storage_offset())

    def _offsets(self, group: Group) -> list[int]:
        strides = torch.tensor(self.parameters[group.name].stride(), dtype=torch.int64)
        return (group.where * strides).sum(1).tolist()  # type: ignore[no-any-return]

    @torch.no_grad()
    def base(self) -> float:
        return objective(self.case.model, self.case.batch).item()

    def forward(self, name: str) -> Callable[[], Tensor]:
        """What evaluates the loss when the weights of one parameter may have moved."""
        return lambda: objective(self.case.model, self.case.batch)

    @torch.no_grad()
    def losses(self, group: Group) -> list[float]:
        weights, forward, out = self._memory(group.name), self.forward(group.name), []
        for at in self._offsets(group):
            entry = weights[at : at + 1]
            before = entry.clone()
            entry += MU
            out.append(forward())
            entry.copy_(before)
        return torch.stack(out).tolist()  # type: ignore[no-any-return]

    def first(self) -> None:
        self.base()

    def quotients(self) -> dict[str, Tensor]:
        base = self.base()
        out = {}
        for group in self.groups:
            flat, at = self._memory(group.name), self._offsets(group)
            step = (flat[at] + MU) - flat[at]  # the step that was really taken
            out[group.name] = (torch.tensor(self.losses(group), dtype=torch.float64) - base) / step.double().cpu()
        return out

    def round(self) -> float:
        total = self.seconds(self.base) / self.case.count
        for group in self.groups:
            total += group.share * self.seconds(lambda g=group: self.losses(g)) / len(group.where)  # type: ignore[misc]
        return total


class Reuse(Loop):
    """The same loop, but from the input of the stage that holds the weight, kept by one base pass."""

    def __init__(self, case: Case, groups: Sequence[Group]) -> None:
        super().__init__(case, groups)
        self.stages = case.work.stages(case.model)
        self.inputs: list[Tensor] = []
        self.start = {name: self._stage(name) for name in self.parameters}

    def _stage(self, name: str) -> int:
        found = [k for k, stage in enumerate(self.stages) if name.startswith(stage.owns)]
        assert len(found) == 1, f"{name} belongs to {len(found)} stages"
        return found[0]

    @torch.no_grad()
    def base(self) -> float:
        self.inputs, x = [], self.case.batch[0]
        for stage in self.stages:
            self.inputs.append(x)
            x = stage.run(x)
        return nn.functional.cross_entropy(x, self.case.batch[1]).item()

    def forward(self, name: str) -> Callable[[], Tensor]:
        start, labels = self.start[name], self.case.batch[1]
        rest = [stage.run for stage in self.stages[start:]]

        def run() -> Tensor:
            x = self.inputs[start]
            for stage in rest:
                x = stage(x)
            return nn.functional.cross_entropy(x, labels)

        return run


class TorchZero(Loop):
    """torchzero's FDM, given views of the sampled weights, so that it does no other work."""

    def __init__(self, case: Case, groups: Sequence[Group]) -> None:
        import torchzero

        super().__init__(case, groups)
        self.tz = torchzero

    def _step(self, views: list[Tensor]) -> list[nn.Parameter]:
        parameters = [nn.Parameter(view) for view in views]  # shares the model's memory
        optimizer = self.tz.Optimizer(parameters, self.tz.m.FDM(h=MU, formula="forward"), self.tz.m.LR(0.0))
        optimizer.step(lambda backward=True: objective(self.case.model, self.case.batch))
        return parameters

    def quotients(self) -> dict[str, Tensor]:
        out = {}
        for group in self.groups:
            weights = self._memory(group.name)
            moved = self._step([weights[at : at + 1] for at in self._offsets(group)])
            out[group.name] = torch.cat([p.grad for p in moved if p.grad is not None]).double()
        return out

    def round(self) -> float:
        total = 0.0
        for group in self.groups:  # a run of neighbours, as torchzero meets them in a whole tensor
            view = self._memory(group.name)[: len(group.where)]
            total += group.share * self.seconds(lambda v=view: self._step([v])) / (len(view) + 1)  # type: ignore[misc]
        return total


class _Functional(Contender):
    """A function of one coordinate under vmap. Train-mode batch norm needs running statistics switched off."""

    most = 6
    """Tensors measured, where the model has more than 20: evenly spaced weights, each standing for its neighbours."""

    layout = False  # average pooling in channels-last memory has no batching rule and would run one by one
    tuned = False

    def __init__(self, case: Case, groups: Sequence[Group]) -> None:
        super().__init__(case, groups)
        if len(self.groups) > 20:
            self.groups = thinned(self.groups, self.most)
        self.model = copy.deepcopy(case.model)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        self.chunk = case.work.chunk

    def _loss(self, name: str, value: Tensor) -> Tensor:
        images, labels = self.case.batch
        logits = functional_call(self.model, {**self.parameters, name: value}, (images,))
        return nn.functional.cross_entropy(logits, labels)

    @abstractmethod
    def _one(self, name: str, at: Tensor) -> Tensor: ...

    @torch.no_grad()
    def _many(self, name: str, flat: Tensor, chunk: int) -> Tensor:
        return vmap(lambda at: self._one(name, at), chunk_size=chunk)(flat)  # type: ignore[no-any-return]

    def _flat(self, name: str, where: Tensor) -> Tensor:
        shape = self.parameters[name].shape
        flat = torch.zeros(len(where), dtype=torch.int64)
        for k, size in enumerate(shape):
            flat = flat * size + where[:, k]
        return flat.to(self.case.device)

    def _full(self, group: Group, chunk: int) -> Tensor:
        """As many of the mask's coordinates as one chunk takes."""
        return self._flat(group.name, self.case.mask[group.name].nonzero()[:chunk])

    def first(self) -> None:
        self._many(self.groups[-1].name, self._flat(self.groups[-1].name, self.groups[-1].where[:1]), 1)

    def settle(self, seconds: float) -> None:
        if self.tuned:
            group = max(self.groups, key=lambda g: g.share)
            trials = {c: self._full(group, c) for c in (1, 4, 16, 64, 256) if c <= 4 * self.case.work.chunk}
            cost = {c: self.seconds(lambda f=f, c=c: self._many(group.name, f, c)) / len(f) for c, f in trials.items()}  # type: ignore[misc]
            self.chunk = min(cost, key=cost.__getitem__)
        self.queries = sum(len(self._full(g, self.chunk)) for g in self.groups)
        self.how = f"chunks of {self.chunk}, one for each of {len(self.groups)} tensors"

    def round(self) -> float:
        total = 0.0
        for group in self.groups:
            flat = self._full(group, self.chunk)
            total += group.share * self.seconds(lambda g=group, f=flat: self._many(g.name, f, self.chunk)) / len(flat)  # type: ignore[misc]
        return total


def thinned(groups: list[Group], most: int) -> list[Group]:
    """``most`` weights evenly spaced through the model, with the shares of the tensors nearest to each."""
    weights = [k for k, g in enumerate(groups) if g.where.shape[1] > 1]
    kept = [weights[round(i * (len(weights) - 1) / (most - 1))] for i in range(most)]
    shares = dict.fromkeys(kept, 0.0)
    for k, group in enumerate(groups):
        shares[min(kept, key=lambda j: abs(j - k))] += group.share
    return [replace(groups[k], share=share) for k, share in shares.items()]


class Vmap(_Functional):
    """vmap over functional_call: the model at many perturbed weights at once."""

    def _one(self, name: str, at: Tensor) -> Tensor:
        p = self.parameters[name]
        moved = p.reshape(-1) + MU * (torch.arange(p.numel(), device=p.device) == at)
        return self._loss(name, moved.view(p.shape))

    @torch.no_grad()
    def quotients(self) -> dict[str, Tensor]:
        base = self._loss(self.groups[0].name, self.parameters[self.groups[0].name]).double()
        out = {}
        for group in self.groups:
            flat, p = self._flat(group.name, group.where), self.parameters[group.name].reshape(-1)
            losses = self._many(group.name, flat, min(self.chunk, 16)).double()
            out[group.name] = (losses - base) / ((p[flat] + MU) - p[flat]).double()
        return out


class BestVmap(Vmap):
    tuned = True


class ForwardMode(_Functional):
    """One derivative a coordinate by forward-mode differentiation, vectorised."""

    context = True

    def _one(self, name: str, at: Tensor) -> Tensor:
        p = self.parameters[name]
        tangent = (torch.arange(p.numel(), device=p.device) == at).to(p.dtype).view(p.shape)
        return jvp(lambda value: self._loss(name, value), (p,), (tangent,))[1]  # type: ignore[no-any-return]

    def quotients(self) -> dict[str, Tensor]:
        return {
            g.name: self._many(g.name, self._flat(g.name, g.where), min(self.chunk, 16)).double() for g in self.groups
        }


class Backprop(Contender):
    """One reverse pass, its whole cost divided by the coordinates it serves."""

    context = True
    how = "one gradient"

    def __init__(self, case: Case, groups: Sequence[Group]) -> None:
        super().__init__(case, groups)
        self.queries = case.count

    def _grads(self) -> dict[str, Tensor]:
        parameters = dict(self.case.model.named_parameters())
        loss = objective(self.case.model, self.case.batch)
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    def first(self) -> None:
        self._grads()

    def quotients(self) -> dict[str, Tensor]:
        grads = self._grads()
        return {g.name: grads[g.name][tuple(g.where.unbind(1))].double() for g in self.groups}

    def round(self) -> float:
        return self.seconds(self._grads) / self.case.count


# --- random directions


def _directions(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, generator=generator)


class RandomLoop(Contender):
    """RGE by whole forward passes: draw a direction, move every selected weight, run, restore."""

    directions = DIRECTIONS

    def __init__(self, case: Case, groups: Sequence[Group]) -> None:
        super().__init__(case, groups)
        self.queries, self.how = self.directions, "one estimate"
        named = dict(case.model.named_parameters())
        self.parameters = {name: named[name] for name, chosen in case.mask.items() if chosen.any()}

    def first(self) -> None:
        with torch.no_grad():
            objective(self.case.model, self.case.batch)

    def quotients(self) -> dict[str, Tensor]:
        """The whole estimate, not only the sample: every coordinate of it depends on every direction."""
        grads = self.estimate()
        return {name: grads[name][self.case.mask[name]].double() for name in self.parameters}

    def round(self) -> float:
        return self.seconds(self.estimate) / (self.directions + 1)

    @torch.no_grad()
    def estimate(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        where = {name: self.case.mask[name] for name in self.parameters}
        sizes = [int(m.sum()) for m in where.values()]
        saved = {name: p.data.clone() for name, p in self.parameters.items()}
        base = objective(self.case.model, self.case.batch).item()
        total = torch.zeros(sum(sizes), dtype=next(iter(saved.values())).dtype)
        for _ in range(self.directions):
            u = _directions(sum(sizes), generator).to(total.dtype)
            for (name, p), part in zip(self.parameters.items(), u.split(sizes), strict=True):
                p.data.add_(torch.zeros_like(p.data).masked_scatter_(where[name], part), alpha=MU)
            total += (objective(self.case.model, self.case.batch).item() - base) / MU * u
            for name, p in self.parameters.items():
                p.data.copy_(saved[name])
        parts = (total / self.directions).split(sizes)
        return {
            name: torch.zeros_like(saved[name]).masked_scatter_(where[name], part)
            for (name, part) in zip(self.parameters, parts, strict=True)
        }


class OursRandom(Contender):
    """RGE on the engine, along the directions of the loop."""

    layout = False
    precision = "float32"

    def __init__(self, case: Case, groups: Sequence[Group]) -> None:
        super().__init__(case, groups)
        self.queries, self.how = DIRECTIONS, "one estimate"
        self.generator = torch.Generator()
        DISTRIBUTIONS["benchmark"] = lambda q, d, _: (_directions(d, self.generator) for _ in range(q))
        self.estimator = RGE(
            case.model, objective, mu=MU, precision=self.precision, queries=DIRECTIONS, distribution="benchmark"
        )

    def _estimate(self) -> dict[str, Tensor]:
        self.generator.manual_seed(0)
        return self.estimator.estimate(self.case.batch, self.case.mask).grads

    def first(self) -> None:
        self.estimator.directions.count = 1
        self._estimate()
        self.estimator.directions.count = DIRECTIONS

    def quotients(self) -> dict[str, Tensor]:
        return {name: grad[self.case.mask[name]].double() for name, grad in self._estimate().items()}

    def round(self) -> float:
        return self.seconds(self._estimate) / (DIRECTIONS + 1)


class OursRandomHalf(OursRandom):
    precision = "bfloat16"


CONTENDERS: dict[tuple[str, str, str], type[Contender]] = {
    ("CGE", "ours", "float32"): Ours,
    ("CGE", "ours", "bfloat16"): OursHalf,
    ("CGE", "plain loop", "float32"): Loop,
    ("CGE", "block reuse", "float32"): Reuse,
    ("CGE", "vmap", "float32"): Vmap,
    ("CGE", "torchzero", "float32"): TorchZero,
    ("CGE", "forward mode", "float32"): ForwardMode,
    ("CGE", "backprop", "float32"): Backprop,
    ("RGE", "ours", "float32"): OursRandom,
    ("RGE", "ours", "bfloat16"): OursRandomHalf,
    ("RGE", "plain loop", "float32"): RandomLoop,
}
"""(estimator, name, dtype) -> how it is done."""

TUNED: dict[type[Contender], type[Contender]] = {Vmap: BestVmap}
"""Contenders with a setting of their own to tune beyond layout and allocator."""

LIMIT = 0.99
"""A contender whose quotients have a smaller cosine to float64's than this computes something else: it is wrong."""


def agreement(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[float, float]:
    """(relative error, cosine) of the quotients that ``got`` has, as one vector."""
    a = torch.cat([torch.as_tensor(got[name]).double().flatten() for name in got])
    b = torch.cat([torch.as_tensor(wanted[name]).double().flatten() for name in got])
    if not float(a.norm()) or not float(b.norm()):
        return (0.0, 1.0) if torch.equal(a, b) else (math.inf, 0.0)
    return float((a - b).norm() / b.norm()), float(a @ b / (a.norm() * b.norm()))
