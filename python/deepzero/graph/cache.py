"""Captured graphs, found again by what they were captured from."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureError
from .bound import Bound
from .capture import capture
from .fingerprint import fingerprint
from .graph import Graph

log = logging.getLogger("deepzero")


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def key_of(bound: Bound) -> tuple[Any, ...]:
    """What a graph is valid for: shapes, dtypes, devices, other leaves, modes and the identity of every parameter."""
    model = bound.model
    tensors = tuple((tuple(t.shape), t.dtype, t.device) for t in bound.tensors)
    others = tuple(_hashable(leaf) for leaf in bound._leaves if not isinstance(leaf, Tensor))
    modes = tuple(module.training for module in bound.modules())
    state = tuple(
        (name, id(t), tuple(t.shape), t.dtype, t.device) for name, t in model.named_parameters(remove_duplicate=False)
    )
    buffers = tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in model.named_buffers())
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
    return tensors, str(bound._spec), others, modes, state, buffers, autocast


@dataclass
class _Entry:
    graph: Graph | None
    reason: str
    fingerprint: dict[str, Any]


@dataclass
class Cache:
    """Captured graphs by key. A changed Python constant recaptures; one that proves irrelevant is not asked again."""

    size: int = 16
    _entries: dict[Any, _Entry] = field(default_factory=dict)
    _irrelevant: set[str] = field(default_factory=set)

    def get(self, bound: Bound, *, fresh: bool = False) -> tuple[Graph | None, str]:
        """The graph for ``bound``, or None and the reason why it cannot be captured."""
        key = key_of(bound)
        entry = self._entries.get(key)
        now = fingerprint(bound.model, bound.objective)
        if entry is not None and not fresh:
            changed = {p for p in now.keys() | entry.fingerprint.keys() if now.get(p) != entry.fingerprint.get(p)}
            changed -= self._irrelevant
            if not changed:
                return entry.graph, entry.reason
            log.debug("recapturing: %s changed", ", ".join(sorted(changed)))
        else:
            changed = set()
        try:
            graph, reason = capture(bound), ""
        except CaptureError as error:
            graph, reason = None, str(error)
        if entry is not None and graph is not None and entry.graph is not None and graph.text() == entry.graph.text():
            old, new = entry.graph.constants.values(), graph.constants.values()
            if all(a is b for a, b in zip(old, new, strict=True)):
                self._irrelevant |= changed
        self._entries.pop(key, None)
        self._entries[key] = _Entry(graph, reason, now)
        while len(self._entries) > self.size:
            self._entries.pop(next(iter(self._entries)))
        return graph, reason

    def __contains__(self, bound: Bound) -> bool:
        return key_of(bound) in self._entries

    def graphs(self) -> set[Graph]:
        """Those that may be asked for again."""
        return {entry.graph for entry in self._entries.values() if entry.graph is not None}
