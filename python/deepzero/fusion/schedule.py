"""A suffix of the graph as steps: fused where a pattern matches, otherwise node by node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from .pattern import Pattern
from .region import Region, closed


@dataclass(frozen=True)
class Step:
    """One entry of a schedule: data alone. What runs it is looked up by the pattern's name (``fusion.LAUNCHES``).

    nodes    in graph order; the difference of the last one is what later steps see
    pattern  name of the pattern, or "" for the generic rule of a single node
    region   what the pattern found
    frees    values that nothing reads after this step
    parts    the same nodes in shorter steps, for when the kernel does not fit; without any, the generic rules run
    """

    nodes: tuple[fx.Node, ...]
    pattern: str
    region: Region | None
    frees: tuple[fx.Node, ...]
    parts: tuple[Step, ...] = ()

    @property
    def kernel(self) -> str:
        """What the kernel takes, as plans print it: "batch_norm+relu"; "" for a generic rule."""
        return self.region.name if self.region is not None else ""

    def plain(self) -> dict[str, Any]:
        """The step in strings, lists and dicts: equal for two captures of the same computation, and fit for JSON."""
        return {
            "nodes": [node.name for node in self.nodes],
            "runs": str(self),
            "pattern": self.pattern,
            "frees": [node.name for node in self.frees],
            "parts": [part.plain() for part in self.parts],
        }

    def __str__(self) -> str:
        return self.kernel or f"rule {self.nodes[0].target}"


def schedule(suffix: Sequence[fx.Node], loss: fx.Node, patterns: Sequence[Pattern]) -> tuple[Step, ...]:
    """The suffix, in graph order, as steps. ``patterns`` are tried in order at every node."""
    inside = set(suffix)
    taken: set[fx.Node] = set()
    single: set[fx.Node] = set()
    found: dict[fx.Node, tuple[Pattern, Region]] = {}  # by the last node
    for node in suffix:
        if node in taken:
            continue
        for pattern in patterns:
            region = pattern.match(node, inside)
            if region is None or node not in region.nodes or not closed(region.nodes):
                continue
            if (taken | single).isdisjoint(region.nodes):
                taken.update(region.nodes)
                found[region.out] = pattern, region
                break
        else:
            single.add(node)
    ordered = [node for node in suffix if node in found or node in single]
    steps = [_step(node, found.get(node), loss, patterns) for node in ordered]
    last: dict[fx.Node, int] = {}
    for i, step in enumerate(steps):
        for node in step.nodes:
            for source in node.all_input_nodes:
                last[source] = i
    frees: list[list[fx.Node]] = [[] for _ in steps]
    for source, i in last.items():
        if source is not loss:
            frees[i].append(source)
    return tuple(replace(step, frees=tuple(nodes)) for step, nodes in zip(steps, frees, strict=True))


def _step(node: fx.Node, found: tuple[Pattern, Region] | None, loss: fx.Node, patterns: Sequence[Pattern]) -> Step:
    if found is None:
        return Step((node,), "", None, ())
    pattern, region = found
    parts: tuple[Step, ...] = ()
    if pattern.encloses:
        shorter = schedule(region.nodes, loss, [p for p in patterns if not p.encloses])
        parts = tuple(replace(s, frees=tuple(n for n in s.frees if n in region.nodes)) for s in shorter)
    return Step(region.nodes, pattern.name, region, (), parts)
