"""Finds routes and joint schedules, each once for a graph, by one small block from the base pass of the moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..base_pass import Base
from ..carriers import Carrier
from ..device import Device
from ..fusion import Pattern, Step, patterns_for, schedule
from ..graph.graph import Graph
from ..plan.memory import block_size, peak_bytes
from ..plan.probe import Ran
from ..plan.route import Route, reach
from ..state import parameter_of
from .pieces import for_one
from .probe import coordinate, everything, probe

MAX_JOINT = 64
"""Sets of parameters moved at once that are planned at a time: a layer-wise estimator has one for each layer."""


class Planner:
    """Plans of one model. Raises :class:`DeviceError` where the device has no memory for one perturbation.

    dtype     of differences
    operands  dtype of the operands of convolutions and matrix products
    block     perturbations per block, or None for what fits into memory
    device    where the model lies; None is a CPU. Set anew when the model moves
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, operands: torch.dtype, block: int | None) -> None:
        self.model = model
        self.dtype = dtype
        self.operands = operands
        self.block = block
        self.device: Device | None = None
        self._routes: WeakKeyDictionary[Graph, dict[str, Route]] = WeakKeyDictionary()
        self._joint: WeakKeyDictionary[Graph, dict[tuple[str, ...], tuple[Step, ...]]] = WeakKeyDictionary()
        self._joint_bytes: WeakKeyDictionary[Graph, dict[tuple[str, ...], int]] = WeakKeyDictionary()

    def route(self, base: Base, name: str) -> Route:
        """How coordinates of one parameter travel."""
        known = self._routes.setdefault(base.graph, {})
        if name not in known:
            parameter = parameter_of(self.model, name)
            suffix = reach(base.graph, [name])
            steps = schedule(suffix, base.graph.loss, self._patterns())
            seed = coordinate(parameter.shape, self.dtype, parameter.device)
            ran = self._probe(base, steps, {name: seed}, f"blocks of {name!r}")
            block = self.block or block_size(peak_bytes(ran), self.device)
            known[name] = Route(name, tuple(parameter.shape), suffix, steps, ran, block)
        return known[name]

    def keep_block(self, graph: Graph, name: str, block: int) -> None:
        """Blocks of one parameter stay this small: the device has no memory for larger ones."""
        self._routes[graph][name] = replace(self._routes[graph][name], block=block)

    def joint_steps(self, graph: Graph, names: Sequence[str]) -> tuple[Step, ...]:
        """The schedule of perturbations that move all of ``names`` at once."""
        known = self._joint.setdefault(graph, {})
        key = tuple(names)
        if key not in known:
            _make_room(known)
            known[key] = schedule(reach(graph, names), graph.loss, self._patterns())
        return known[key]

    def joint_bytes(self, base: Base, names: Sequence[str]) -> int:
        """Bytes that one perturbation that moves all of ``names`` at once takes at most."""
        known = self._joint_bytes.setdefault(base.graph, {})
        key = tuple(names)
        if key not in known:
            _make_room(known)
            parameters = {name: parameter_of(self.model, name) for name in names}
            seeds = {name: everything(p.shape, self.dtype, p.device) for name, p in parameters.items()}
            ran = self._probe(base, self.joint_steps(base.graph, names), seeds, "blocks of random directions")
            known[key] = peak_bytes(ran)
        return known[key]

    def _probe(self, base: Base, steps: Sequence[Step], moved: Mapping[str, Carrier], what: str) -> tuple[Ran, ...]:
        seeds = {node: c for name, c in moved.items() for node in base.graph.placeholders(name)}
        return for_one(lambda: probe(base, steps, seeds, operands=self.operands), what)

    def _patterns(self) -> Sequence[Pattern]:
        where = torch.device("cpu") if self.device is None else self.device.where
        return patterns_for(where, self.dtype)


def _make_room(known: dict[tuple[str, ...], Any]) -> None:
    """Masks may name other parameters at every step: forget the oldest plan for such a set when there are too many."""
    if len(known) >= MAX_JOINT:
        del known[next(iter(known))]
