"""What a captured graph silently depends on: everything Python-valued that tracing has burnt in."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..blackbox import BlackBox
from ..objective import Objective
from ..surroundings import names_used

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def _plain_value(value: Any, depth: int = 0) -> Any:
    """A hashable description of ``value``, or NotImplemented for what is not followed."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        version = 0 if value.is_inference() else value._version
        return (id(value), version, tuple(value.shape), value.dtype)
    if isinstance(value, tuple | list) and len(value) <= 64 and depth < 4:
        items = (_plain_value(item, depth + 1) for item in value)
        return (type(value).__name__, len(value), *(item for item in items if item is not NotImplemented))
    if isinstance(value, dict) and len(value) <= 64:
        return _plain_value([item for pair in value.items() for item in pair], depth)
    if isinstance(value, SimpleNamespace | argparse.Namespace) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    ):
        return _plain_value(vars(value), depth)
    if isinstance(value, BlackBox):
        return ("black box", value.handle)
    return NotImplemented


def _walk_function(function: Any, path: str, found: dict[str, Any], depth: int = 0) -> None:
    if isinstance(function, functools.partial):
        found[f"{path} arguments"] = _plain_value([*function.args, function.keywords])
        function = function.func
    if isinstance(function, MethodType):
        found[f"{path} self"] = _plain_value(getattr(function.__self__, "__dict__", None))
        function = function.__func__
    if not isinstance(function, FunctionType) or depth > 3:
        return
    values = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    named: dict[str, Any] = {}
    for name, cell in values.items():
        with contextlib.suppress(ValueError):  # an empty cell
            named[name] = cell.cell_contents
    for name in names_used(function.__code__):
        if name in function.__globals__:
            named[name] = function.__globals__[name]
    named |= {f"default {i}": v for i, v in enumerate(function.__defaults__ or ())}
    named |= {f"default {k}": v for k, v in (function.__kwdefaults__ or {}).items()}
    for name, value in named.items():
        described = _plain_value(value)
        if described is not NotImplemented:
            found[f"{path}.{name}"] = described
        elif isinstance(value, FunctionType | MethodType) and value.__module__ == function.__module__:
            _walk_function(value, f"{path}.{name}", found, depth + 1)


def fingerprint(model: nn.Module, objective: Objective) -> dict[str, Any]:
    """Path -> value of the Python constants that the objective and the modules may have used while tracing."""
    found: dict[str, Any] = {}
    _walk_function(objective, "objective", found)
    if not isinstance(objective, FunctionType | MethodType | functools.partial):
        for name, value in getattr(objective, "__dict__", {}).items():
            found[f"objective.{name}"] = _plain_value(value)
        _walk_function(type(objective).__call__, "objective.__call__", found)
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("training", "_parameters", "_buffers", "_modules") or name.endswith("_hooks"):
                continue
            described = _plain_value(value)
            if described is not NotImplemented:
                found[f"{prefix}.{name}"] = described
        found[f"{prefix} hooks"] = tuple(module._forward_hooks) + tuple(module._forward_pre_hooks)
    return found
