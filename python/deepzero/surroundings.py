"""State that is no parameter and no buffer of the model, and that a call of the objective may change all the same.

Attributes of modules (the membrane of a spiking layer, a hidden state, a cache, a counter), lists and dicts that an
objective or a hook logs into, other modules that the objective closes over (a teacher with batch norm), generators of
its own. An estimate puts all of it back; ``backward`` leaves it as one ordinary call would.

Followed are the attributes of every module, and what functions close over or name: containers, tensors, arrays,
generators, modules, objects of the user's own classes. Not followed is what lies behind C code, an iterator, a file,
and the values of NumPy arrays above :data:`CLONED` bytes.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .blackbox import BlackBox
from .state import random_state, random_state_kept, set_random_state

CLONED = 1 << 22
"""Bytes of the largest tensor or array that is cloned. Of a larger tensor only a change is noticed, and refused."""

_DEPTH = 12
_OWN = ("_parameters", "_buffers", "_modules")
_LEAVES = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    type,
    ModuleType,
    BuiltinFunctionType,
)
_SKIPPED = (torch.optim.Optimizer, torch.utils.data.DataLoader, torch.utils.data.Dataset, torch.nn.Parameter)


class _Place(ABC):
    """One object whose content may change, at ``path``; ``saved`` is its content when it was seen."""

    def __init__(self, path: str, target: Any) -> None:
        self.path, self.target = path, target
        self.saved = self.content()

    @abstractmethod
    def content(self) -> Any:
        """What it holds now."""

    @abstractmethod
    def put(self, content: Any) -> None:
        """Make it hold ``content``."""

    def changed(self) -> bool:
        return not _same(self.saved, self.content())


def _same(a: Any, b: Any) -> bool:
    """Whether two contents hold the very same objects."""
    if isinstance(a, dict):
        return len(a) == len(b) and all(x is y and a[x] is b[y] for x, y in zip(a, b, strict=True))
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


class _Dict(_Place):
    """A dict; of a module's attributes, without those that hold its parameters, buffers and children."""

    without: tuple[str, ...] = ()

    def content(self) -> dict[Any, Any]:
        return {k: v for k, v in self.target.items() if k not in self.without}

    def put(self, content: dict[Any, Any]) -> None:
        for key in [k for k in self.target if k not in self.without]:
            del self.target[key]
        self.target.update(content)


class _Attributes(_Dict):
    without = _OWN


class _Names(_Place):
    """Names of a module's globals that a function uses."""

    def __init__(self, path: str, target: dict[str, Any], names: tuple[str, ...]) -> None:
        self.names = names
        super().__init__(path, target)

    def content(self) -> dict[str, Any]:
        return {name: self.target[name] for name in self.names if name in self.target}

    def put(self, content: dict[str, Any]) -> None:
        for name in self.names:
            if name in content:
                self.target[name] = content[name]
            else:
                self.target.pop(name, None)


class _Cell(_Place):
    def content(self) -> tuple[Any, ...]:
        try:
            return (self.target.cell_contents,)
        except ValueError:  # empty
            return ()

    def put(self, content: tuple[Any, ...]) -> None:
        if content:
            self.target.cell_contents = content[0]
        else:
            del self.target.cell_contents


class _Sequence(_Place):
    """A list or deque."""

    def content(self) -> tuple[Any, ...]:
        return tuple(self.target)

    def put(self, content: tuple[Any, ...]) -> None:
        self.target.clear()
        self.target.extend(content)


class _Set(_Place):
    def content(self) -> frozenset[Any]:
        return frozenset(self.target)

    def put(self, content: frozenset[Any]) -> None:
        self.target.clear()
        self.target.update(content)

    def changed(self) -> bool:
        return bool(self.saved != self.content())


class _Tensor(_Place):
    """A tensor, by its values; a large one by its version, which batch norm's update of its statistics leaves alone."""

    def content(self) -> tuple[int, Tensor | None]:
        value = self.target.detach()
        return self._version(), value.clone() if value.nbytes <= CLONED else None

    def _version(self) -> int:
        return 0 if self.target.is_inference() else int(self.target._version)

    def put(self, content: tuple[int, Tensor | None]) -> None:
        if content[1] is not None:
            with torch.no_grad():
                self.target.copy_(content[1])
            self.saved = (self._version(), self.saved[1])

    def changed(self) -> bool:
        version, value = self.saved
        return self._version() != version if value is None else not torch.equal(value, self.target)


class _Array(_Place):
    def content(self) -> Any:
        return self.target.copy() if self.target.nbytes <= CLONED else None

    def put(self, content: Any) -> None:
        if content is not None and self.target.flags.writeable:
            self.target[...] = content

    def changed(self) -> bool:
        return self.saved is not None and self.saved.tobytes() != self.target.tobytes()


class _Generator(_Place):
    """A generator of random numbers: torch's, NumPy's or Python's."""

    def content(self) -> Any:
        if isinstance(self.target, torch.Generator):
            return self.target.get_state()
        if isinstance(self.target, random.Random):
            return self.target.getstate()
        if isinstance(self.target, np.random.RandomState):
            return self.target.get_state(legacy=False)
        return self.target.bit_generator.state

    def put(self, content: Any) -> None:
        if isinstance(self.target, torch.Generator):
            self.target.set_state(content)
        elif isinstance(self.target, random.Random):
            self.target.setstate(content)
        elif isinstance(self.target, np.random.RandomState):
            self.target.set_state(content)
        else:
            self.target.bit_generator.state = content

    def changed(self) -> bool:
        now = self.content()
        return not torch.equal(self.saved, now) if isinstance(now, Tensor) else str(self.saved) != str(now)


Left = list[tuple[_Place, Any]]
"""What a call has changed: places and their contents after it."""


class Surroundings:
    """What a call of ``objective(model, ...)`` may change beside parameters, buffers and the global random state.

    others  modules that the objective closes over and that are no part of the model
    only    note places of this kind alone
    """

    def __init__(self, model: nn.Module, objective: Any, *, only: type[_Place] = _Place) -> None:
        self.others: list[nn.Module] = []
        self._only = only
        self._places: list[_Place] = []
        self._seen: set[int] = set()
        self._inside = {id(module) for module in model.modules()}
        self._alive: list[Any] = []  # ids are those of living objects only
        for name, module in model.named_modules():
            self._module(module, f"model.{name}" if name else "model")
        self._walk(objective, "objective", 0)

    def changed(self) -> list[str]:
        """Paths of what is not as it was when this was made."""
        return [place.path for place in self._places if place.changed()]

    def restore(self) -> None:
        """Put everything back."""
        for place in self._places:
            if place.changed():
                place.put(place.saved)

    def taken(self) -> Left:
        """What has changed, with its content now: for :func:`give`."""
        return [(place, place.content()) for place in self._places if place.changed()]

    def lost(self) -> list[str]:
        """Paths of large tensors that have changed and of which no copy was made."""
        return [p.path for p in self._places if isinstance(p, _Tensor) and p.saved[1] is None and p.changed()]

    # --- finding it

    def _note(self, kind: type[_Place], *where: Any) -> None:
        if issubclass(kind, self._only):
            self._places.append(kind(*where))

    def _new(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        self._seen.add(id(value))
        self._alive.append(value)
        return True

    def _module(self, module: nn.Module, path: str) -> None:
        if not self._new(module):
            return
        self._note(_Attributes, path, vars(module))
        for name, value in list(vars(module).items()):
            if name not in _OWN and not (_is_hooks(name) and not value):  # a call that adds hooks is not followed
                self._walk(value, f"{path}.{name}", 1)
        if not type(module).__module__.startswith("torch."):
            self._walk(type(module).forward, path, 1)

    def _other(self, module: nn.Module, path: str) -> None:
        self.others.append(module)
        for name, each in module.named_modules():
            if id(each) in self._inside:
                continue
            here = f"{path}.{name}" if name else path
            self._module(each, here)
            self._walk(each._buffers, here, 1)

    def _walk(self, value: Any, path: str, depth: int) -> None:
        if depth > _DEPTH or isinstance(value, _LEAVES):
            return
        if isinstance(value, nn.Module):
            if id(value) not in self._inside and id(value) not in self._seen:
                self._other(value, path)
            return
        if isinstance(value, _SKIPPED) or not self._new(value):
            return
        for each, where in self._content(value, path):
            self._walk(each, where, depth + 1)

    def _content(self, value: Any, path: str) -> Iterator[tuple[Any, str]]:
        """Note what may change, and go through what it holds."""
        if isinstance(value, BlackBox):
            yield value.function, path
        elif isinstance(value, Tensor):
            self._note(_Tensor, path, value)
        elif isinstance(value, np.ndarray):
            self._note(_Array, path, value)
        elif isinstance(value, torch.Generator | random.Random | np.random.Generator | np.random.RandomState):
            self._note(_Generator, path, value)
        elif isinstance(value, FunctionType):
            yield from self._function(value, path)
        elif isinstance(value, MethodType):
            yield value.__self__, path
            yield value.__func__, path
        elif isinstance(value, functools.partial):
            yield from ((each, path) for each in (value.func, *value.args, *value.keywords.values()))
        elif isinstance(value, dict):
            self._note(_Dict, path, value)
            yield from ((each, f"{path}[{key!r}]") for key, each in list(value.items()))
        elif isinstance(value, list | collections.deque):
            self._note(_Sequence, path, value)
            yield from ((each, f"{path}[{i}]") for i, each in enumerate(list(value)))
        elif isinstance(value, tuple | frozenset):
            yield from ((each, path) for each in value)
        elif isinstance(value, set):
            self._note(_Set, path, value)
        elif isinstance(getattr(value, "__dict__", None), dict) and _users(type(value)):
            self._note(_Dict, path, vars(value))
            yield from ((each, f"{path}.{name}") for name, each in list(vars(value).items()))
            if callable(value):
                yield type(value).__call__, path

    def _function(self, function: FunctionType, path: str) -> Iterator[tuple[Any, str]]:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            yield from self._cell(cell, f"{path}.{name}")
        for i, value in enumerate((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())):
            yield value, f"{path}, default {i}"
        if _users(function):
            names = tuple(sorted(n for n in names_used(function.__code__) if n in function.__globals__))
            self._note(_Names, path, function.__globals__, names)
            yield from ((function.__globals__[name], name) for name in names)

    def _cell(self, cell: CellType, path: str) -> Iterator[tuple[Any, str]]:
        self._note(_Cell, path, cell)
        with contextlib.suppress(ValueError):  # empty
            yield cell.cell_contents, path


class BoxState:
    """The random state from which the base pass called a black box: every query calls it from the same one.

    Of the global generators, and of those that the box's function closes over.
    """

    def __init__(self, box: BlackBox) -> None:
        self.random = random_state()
        self.generators = Surroundings(nn.Module(), box.function, only=_Generator)._places

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, a call draws what the base pass drew; the global generators are as before afterwards."""
        with random_state_kept():
            set_random_state(self.random)
            for place in self.generators:
                place.put(place.saved)
            yield


def give(taken: Left) -> None:
    """Leave things as they were when they were taken."""
    for place, content in taken:
        place.put(content)


def _is_hooks(name: str) -> bool:
    return "_hooks" in name or name == "_non_persistent_buffers_set"


def _users(value: Any) -> bool:
    """Whether a class or function is the user's rather than a library's."""
    name = getattr(value, "__module__", None) or ""
    top = name.partition(".")[0]
    return top not in sys.stdlib_module_names - {"__main__"} and top not in _LIBRARIES


_LIBRARIES = {"torch", "numpy", "deepzero", "dzkernels", "transformers", "scipy", "pandas", "sklearn", "jax"}


def names_used(code: CodeType) -> set[str]:
    """Names of globals and attributes in a function's code and in the functions inside it."""
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, CodeType):
            names |= names_used(const)
    return names
