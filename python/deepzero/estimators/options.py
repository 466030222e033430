"""What every estimator checks before any work: steps, schemes, masks, and that the objective returns one number."""

from __future__ import annotations

import math

from ..errors import StepError

SCHEMES = {"forward": (1.0,), "central": (1.0, -1.0)}
"""scheme -> the signs of the steps; the difference of the outermost losses is divided by their distance."""


def check_mu(mu: float) -> float:
    value = float(mu)
    if not (math.isfinite(value) and value > 0):
        raise StepError(f"mu must be a positive finite step in weight units, got {mu!r}. The paper's is 5e-3.")
    return value


def check_scheme(scheme: str) -> str:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(map(repr, SCHEMES))}, got {scheme!r}")
    return scheme
