"""Fusion groups: nodes that one kernel takes together, found by the fields of a dataclass.

A region is a dataclass whose fields, in order, are the nodes that follow one another: a view
(:mod:`deepzero.graph.nodes`) or another region. ``X | None`` may be missing. Each works on the value before it, and
nothing else reads that value.

    @dataclass(frozen=True)
    class NormRegion(Region):
        norm: BatchNorm
        relu: Relu | None
        pool: SquarePool | None = field(metadata=only_if(lambda found: found["relu"] is not None))
"""

from __future__ import annotations

import operator
import types
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import fx
from typing_extensions import Self

from ..graph.nodes import View
from ..rules import RULES


@dataclass(frozen=True)
class Region:
    """nodes: in graph order; the difference of the last one is what later steps see."""

    nodes: tuple[fx.Node, ...]

    @property
    def out(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def name(self) -> str:
        """Its parts, as plans print it: "batch_norm+relu"."""
        return "+".join(_label(part, link) for link in _links(type(self)) if (part := getattr(self, link.name)))

    def fits(self, inside: Collection[fx.Node]) -> bool:
        """What the kernel asks of the parts beyond their order. ``inside``: the nodes that a perturbation reaches."""
        return True

    @classmethod
    def at(cls, start: fx.Node, inside: Collection[fx.Node], value: fx.Node | None = None) -> Self | None:
        """The region that begins with the node ``start``, working on ``value``; None where there is none."""
        nodes: list[fx.Node] = []
        found: dict[str, Any] = {}
        node: fx.Node | None = start
        for link in _links(cls):
            part = None
            if node is not None and link.only_if(found):
                part = _part(link, node, inside, value)
            if part is not None and link.ahead is not None and not link.ahead(part):
                part = None
            if part is None and not link.optional:
                return None
            found[link.name] = part
            if part is None or link.ahead is not None:
                continue
            nodes += part.nodes if isinstance(part, Region) else with_result(part.node, inside)
            value = nodes[-1]
            node = only_user(value, inside)
        region = cls(tuple(nodes), **found)
        return region if nodes and region.fits(inside) else None


def only_if(accept: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """A field that is left out unless ``accept`` agrees to the fields before it, which are given by name."""
    return {"only_if": accept}


def ahead(accept: Callable[[Any], bool]) -> dict[str, Any]:
    """A field for what comes after the region and stays outside of it, where ``accept`` says that it is of use."""
    return {"ahead": accept}


class _Link(NamedTuple):
    name: str
    kind: type[View] | type[Region]
    optional: bool
    only_if: Callable[[dict[str, Any]], bool]
    ahead: Callable[[Any], bool] | None


def _always(found: dict[str, Any]) -> bool:
    return True


_LINKS: dict[type[Region], tuple[_Link, ...]] = {}


def _links(region: type[Region]) -> tuple[_Link, ...]:
    """The fields of a region after ``nodes``, as links of a chain."""
    if region not in _LINKS:
        hints = typing.get_type_hints(region)
        links = []
        for each in fields(region)[1:]:
            kinds = typing.get_args(hints[each.name]) or (hints[each.name],)
            kind = next(k for k in kinds if k is not types.NoneType)
            only, beyond = each.metadata.get("only_if", _always), each.metadata.get("ahead")
            links.append(_Link(each.name, kind, len(kinds) > 1, only, beyond))
        _LINKS[region] = tuple(links)
    return _LINKS[region]


def _part(link: _Link, node: fx.Node, inside: Collection[fx.Node], value: fx.Node | None) -> Any:
    if issubclass(link.kind, Region):
        return link.kind.at(node, inside, value)
    view = link.kind.of(node) if value is None else link.kind.after(value, node)
    return view if view is not None and with_result(node, inside) else None


def with_result(node: fx.Node, inside: Collection[fx.Node]) -> tuple[fx.Node, ...]:
    """The node; with its first result, where it has several and that alone is read; () where another is."""
    if not isinstance(node.meta.get("val"), tuple | list):
        return (node,)
    result = only_user(node, inside)
    return (node, result) if result is not None and result.target is operator.getitem and result.args[1] == 0 else ()


def _label(part: Any, link: _Link) -> str:
    if link.ahead is not None:
        return link.name
    return part.name if isinstance(part, Region) else str(part.label)


def only_user(node: fx.Node, inside: Collection[fx.Node]) -> fx.Node | None:
    """What reads the node, if one node of ``inside`` does."""
    users = [u for u in node.users if u in inside]
    return users[0] if len(users) == 1 else None


def closed(nodes: Sequence[fx.Node]) -> bool:
    """Whether no value inside the region is a weight, bias or mask there too: kernels take those to be constant."""
    read: list[fx.Node] = []
    for node in nodes:
        data = RULES[node.target].data if node.target in RULES else (0,)
        others = [arg for position, arg in enumerate(node.args) if position not in data]
        fx.map_arg((tuple(others), node.kwargs), read.append)
    return set(nodes[:-1]).isdisjoint(read)
