"""The options that every estimator on the engine takes, and their checks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypedDict

from ..errors import StepError

SCHEMES = {"forward": (1.0,), "central": (1.0, -1.0)}
"""scheme -> the signs of the steps; the difference of the outermost losses is divided by their distance."""


class Options(TypedDict, total=False):
    """Keyword arguments of :class:`EngineEstimator`, where they are explained; its subclasses hand them on."""

    mu: float
    scheme: str
    precision: str
    block: int | None
    strict: bool
    budget: int | None


class RandomOptions(Options, total=False):
    """Keyword arguments of :class:`RGE`."""

    queries: int
    distribution: str
    seed: int


def check_mu(mu: float) -> float:
    value = float(mu)
    if not (math.isfinite(value) and value > 0):
        raise StepError(f"mu must be a positive finite step in weight units, got {mu!r}. The paper's is 5e-3.")
    return value


def check_scheme(scheme: str) -> str:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(map(repr, SCHEMES))}, got {scheme!r}")
    return scheme


def spelled_out(function: Callable[..., Any], options_of: Callable[..., Any]) -> inspect.Signature:
    """The signature of ``function`` with its ``**options`` spelled out: the keyword arguments of ``options_of``.

    What ``help()``, notebooks and configurations show and check.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(own) == len(signature.parameters):
        return signature
    more = [
        p
        for p in inspect.signature(options_of).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in signature.parameters
    ]
    return signature.replace(parameters=[*own, *more])
