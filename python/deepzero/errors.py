"""The exceptions of deepzero, the hint for a misspelt name, and the line that a warning points at.

Every error says what was being done, what was expected, what came, and what to do about it. Each class also
derives from the built-in exception that a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class DeepZeroError(Exception):
    """Base class of every error that deepzero raises on purpose."""


class MaskError(DeepZeroError, ValueError):
    """A mask does not fit the model: unknown names, wrong shapes or dtypes, frozen parameters, nothing selected."""


class ObjectiveError(DeepZeroError, ValueError):
    """The objective did not return one finite real number, or changed between two calls with the same input."""


class StepError(DeepZeroError, ValueError):
    """A finite-difference step is unusable: not positive, not finite, or lost where a weight has to be written."""


class CaptureError(DeepZeroError, RuntimeError):
    """The model and objective could not be turned into a graph, or the graph no longer describes them."""


class NoRuleError(DeepZeroError, RuntimeError):
    """An operator has no difference rule and ``strict`` forbids the slow exact fallback."""


class DeviceError(DeepZeroError, RuntimeError):
    """A device cannot do what is asked: no memory for one query, a dtype it lacks, tensors that lie elsewhere."""


class BudgetError(DeepZeroError, RuntimeError):
    """The next estimate would exceed the query budget; it was not started."""


class DataError(DeepZeroError, ValueError):
    """A data set is missing, truncated, or not in its standard file format."""


class CheckpointError(DeepZeroError, RuntimeError):
    """A checkpoint is missing, corrupted, from a newer version, or belongs to another run."""


class ConfigError(DeepZeroError, ValueError):
    """A configuration key is unknown or has an unusable value."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """`` Did you mean 'weight'?`` with the known name closest to ``name``, for the end of a sentence.

    ``otherwise`` follows in its place, after a space too, when no known name is close.
    """
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else otherwise
    return f" {hint}" if hint else ""


def users_level() -> int:
    """The ``stacklevel`` at which a warning of the calling function points at the user's line, outside of deepzero."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("deepzero", "contextlib"):
        frame, level = frame.f_back, level + 1
    return level
