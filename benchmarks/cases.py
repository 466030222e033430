"""The works that every contender does: model, batch, mask and step as data, and the sample they are compared on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deepzero as dz
from deepzero.models.resnet import ResNet
from deepzero.models.vit import ViT
from deepzero.sparsity import LayerRatios, LayerwiseRandom, UniformRandom

MU = 5e-3
DIRECTIONS = 64
"""Random directions of one RGE estimate."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Stage:
    """A piece of the model that can be rerun from its own input; ``owns`` are prefixes of its parameters' names."""

    owns: tuple[str, ...]
    run: Callable[[Tensor], Tensor]


def layers(model: nn.Module) -> list[Stage]:
    """Every layer of a sequential model: the finest reuse there is."""
    return [Stage((f"{name}.",), layer) for name, layer in cast("nn.Sequential", model).named_children()]


def resnet_blocks(model: nn.Module) -> list[Stage]:
    """The paper's code: stem, residual blocks and head, twelve in all; a block is rerun whole."""
    net = cast("ResNet", model)
    stages = [Stage(("conv1.",), net.conv1), Stage(("bn1.",), lambda x: F.relu(net.bn1(x)))]
    for k, layer in enumerate((net.layer1, net.layer2, net.layer3), 1):
        stages += [Stage((f"layer{k}.{name}.",), block) for name, block in layer.named_children()]
    return [*stages, Stage(("linear.",), lambda x: net.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))]


def vit_blocks(model: nn.Module) -> list[Stage]:
    net = cast("ViT", model)
    stages = [Stage(("embed.", "position"), lambda x: net.embed(x).flatten(2).transpose(1, 2) + net.position)]
    stages += [Stage((f"blocks.{name}.",), block) for name, block in net.blocks.named_children()]
    return [*stages, Stage(("norm.", "head."), lambda x: net.head(net.norm(x).mean(1)))]


def reference_ratio(name: str) -> float:
    """What the paper's released code prunes of each ResNet-20 tensor at 90 %: no bias or norm, late layers most."""
    if not name.endswith("weight") or "bn" in name:
        return 0.0
    first = ".0.conv1." in name
    by_stage = {"layer1": 0.485, "layer2": 0.58 if first else 0.79, "layer3": 0.87 if first else 0.975}
    return {"conv1": 0.18, "linear": 0.28}.get(name.split(".")[0]) or by_stage[name.split(".")[0]]


@dataclass(frozen=True)
class Work:
    """What is estimated.

    image      [C, H, W] of one sample
    sparsity   fraction of all coordinates that a uniform random mask leaves out, 0 for none
    ratios     or the fraction left out of each parameter
    stages     how block-level reuse cuts the model
    chunk      perturbations that vmap takes at once in its default row
    sample     coordinates on which peers are timed and everyone is checked, about
    parameters of the model, for the tests
    """

    title: str
    model: Callable[[], nn.Module]
    image: tuple[int, int, int]
    batch: int
    stages: Callable[[nn.Module], list[Stage]]
    parameters: int
    sparsity: float = 0.0
    ratios: Callable[[str], float] | None = None
    chunk: int = 64
    sample: int = 64


_RESNET = Work(
    "ResNet-20, batch 32, 90 % sparse", dz.models.resnet20, (3, 32, 32), 32, resnet_blocks, 269_722, 0.9, chunk=8
)

WORKS: dict[str, Work] = {
    "W1": Work("paper CNN depth 3, batch 128", lambda: dz.models.paper_cnn(3), (3, 32, 32), 128, layers, 6_670),
    "W2": _RESNET,
    "W2r": replace(_RESNET, title="ResNet-20, batch 32, reference ratios", sparsity=0.0, ratios=reference_ratio),
    "W3": Work(
        "MLP 784-32-10, batch 64", lambda: dz.models.mlp(hidden=(32,)), (1, 28, 28), 64, layers, 25_450, sample=512
    ),
    "W4": Work("ViT 6x96, batch 16, 95 % sparse", dz.models.vit, (3, 32, 32), 16, vit_blocks, 683_050, 0.95, chunk=8),
}


def objective(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass
class Case:
    """A work, built: the same numbers in every process. The model is in training mode."""

    work: Work
    model: nn.Module
    batch: Batch
    mask: dict[str, Tensor]

    @property
    def count(self) -> int:
        """Coordinates of the mask."""
        return sum(int(m.sum()) for m in self.mask.values())

    @property
    def device(self) -> torch.device:
        return self.batch[0].device

    def to(self, device: torch.device | str) -> Case:
        """The same numbers on another device; the mask stays where it is."""
        images, labels = (t.to(device) for t in self.batch)
        return Case(self.work, copy.deepcopy(self.model).to(device), (images, labels), self.mask)

    def double(self) -> Case:
        model = copy.deepcopy(self.model).double()
        return Case(self.work, model, (self.batch[0].double(), self.batch[1]), self.mask)

    def channels_last(self) -> Case:
        model = copy.deepcopy(self.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = self.batch[0].contiguous(memory_format=torch.channels_last)
        return Case(self.work, model, (images, self.batch[1]), self.mask)


def build(work: Work, batch: int | None = None) -> Case:
    """Random images and labels, initial weights, the mask; all from seed 0. ``batch`` overrides the work's."""
    torch.manual_seed(0)
    model = work.model().train()
    images = torch.randn(batch or work.batch, *work.image)
    labels = torch.randint(0, 10, (len(images),))
    if work.ratios is not None:
        pruned = {name: work.ratios(name) for name, _ in model.named_parameters()}
        mask = LayerwiseRandom(LayerRatios.of(model, pruned)).sample(0)
    elif work.sparsity:
        mask = UniformRandom(model, work.sparsity).sample(0)
    else:
        mask = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    return Case(work, model, (images, labels), mask)


@dataclass(frozen=True)
class Group:
    """Sampled coordinates of one parameter: ``where`` [s, rank], standing for ``share`` of the mask's coordinates."""

    name: str
    where: Tensor
    share: float


def sample(case: Case, size: int) -> list[Group]:
    """About ``size`` random coordinates of the mask, in proportion over its tensors, but at least one of each."""
    generator = torch.Generator().manual_seed(1)
    groups = []
    for name, chosen in case.mask.items():
        where = chosen.nonzero()
        if len(where):
            take = min(len(where), max(1, round(size * len(where) / case.count)))
            picked = torch.randperm(len(where), generator=generator)[:take].sort().values
            groups.append(Group(name, where[picked], len(where) / case.count))
    return groups


def mask_of(case: Case, groups: list[Group]) -> dict[str, Tensor]:
    out = {}
    for group in groups:
        out[group.name] = torch.zeros_like(case.mask[group.name])
        out[group.name][tuple(group.where.unbind(1))] = True
    return out


def every(case: Case, k: int) -> dict[str, Tensor]:
    """Every k-th coordinate of the mask in order, and at least one of every tensor: proportional to within one each."""
    out, seen = {}, 0
    for name, chosen in case.mask.items():
        where = chosen.flatten().nonzero()[:, 0]
        if len(where):
            start = -seen % k
            kept = where[start::k] if start < len(where) else where[:1]
            out[name] = torch.zeros(chosen.numel(), dtype=torch.bool).index_fill_(0, kept, True).view(chosen.shape)
            seen += len(where)
    return out
