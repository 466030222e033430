"""The factories that a configuration chooses by name, and their options, checked before any work."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from ..errors import ConfigError, DeepZeroError, did_you_mean


def chosen(
    section: str, name: str, known: Mapping[str, Callable[..., Any]], *, key: str = "name"
) -> Callable[..., Any]:
    if name not in known:
        hint = did_you_mean(name, known)
        raise ConfigError(f"{section}.{key} = {name!r} is unknown.{hint} Known: {', '.join(known)}.")
    return known[name]


def checked_options(
    section: str,
    name: str,
    factory: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    reserved: Any,
    key: str = "options",
) -> dict[str, Any]:
    """``options`` checked against the factory's own keyword arguments."""
    free = [option for option in inspect.signature(factory).parameters if option not in reserved]
    for option in options:
        if option not in free:
            raise ConfigError(
                f"{section}.{key}.{option} is not an option of {name}.{did_you_mean(option, free)} Options: "
                f"{', '.join(free) or 'none'}."
            )
    return cast("dict[str, Any]", dict(options))


def made(section: str, name: str, factory: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """What ``factory`` makes; a value it refuses is the configuration's mistake."""
    try:
        return factory(*given, **options)
    except DeepZeroError:
        raise
    except (TypeError, ValueError) as refused:
        raise ConfigError(f"{section}.options do not suit {name}: {refused}") from refused
