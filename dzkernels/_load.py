"""Loads the native libraries. A failure is stored; build_info() reports it, and ops that need the library raise it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any


class BackendError(RuntimeError):
    """A backend or instruction set was requested that cannot run here."""


@functools.cache
def _native() -> tuple[ModuleType | None, str | None]:
    """(dzkernels._C, None), or what was loaded (perhaps None) and the error."""
    try:
        from . import _C
    except ImportError as error:
        reason = f"dzkernels._C could not be loaded: {error}"
        warnings.warn(f"{reason}. The CPU kernels are disabled; reinstall deepzero to build them.", stacklevel=4)
        return None, reason
    level = os.environ.get("DZ_ISA")
    if level:
        try:
            _C.set_isa(level)
        except ValueError as error:
            return _C, f"DZ_ISA={level!r} was requested but {error}"
    return _C, None


def native() -> ModuleType:
    """dzkernels._C. BackendError if it did not load."""
    module, error = _native()
    if module is None or error is not None:
        raise BackendError(error)
    return module


@functools.cache
def kernel(op: str) -> Callable[..., None]:
    """The CPU kernel of an op. Each call runs at the instruction set level then in use."""
    return native().kernel(op)


def native_error() -> str | None:
    return _native()[1]


@functools.cache
def _cuda_library() -> tuple[ctypes.CDLL | None, str | None]:
    module, error = _native()
    if module is None:
        return None, error
    if not module.cuda_archs:
        return None, f"dzkernels was built without CUDA ({module.cuda})"
    spec = importlib.util.find_spec("dzkernels._cuda")
    if spec is None or spec.origin is None:
        return None, "dzkernels._cuda is missing from this installation"
    try:
        return ctypes.CDLL(spec.origin), None
    except OSError as os_error:
        return None, f"dzkernels._cuda could not be loaded: {os_error}"


def cuda_library() -> ctypes.CDLL:
    """The library of CUDA kernels. BackendError if it did not load."""
    library, error = _cuda_library()
    if library is None:
        raise BackendError(error)
    return library


def cuda_error() -> str | None:
    return _cuda_library()[1]


def version() -> str:
    try:
        return importlib.metadata.version("deepzero")
    except importlib.metadata.PackageNotFoundError:
        module, _ = _native()
        return f"{module.version} (not installed)" if module is not None else "unknown (not installed)"


def build_info() -> dict[str, Any]:
    """What was built, and what of it can run here.

    version        version of deepzero
    compiler       compiler of the CPU kernels; None if they did not load
    isa_built      instruction set levels in the binary
    isa            level in use; None if the CPU kernels did not load
    isa_reason     why this level is in use
    isa_refusals   for each level built, why it cannot run here, or None
    cuda_archs     compute capabilities in the binary; empty without CUDA
    cuda_reason    how the CUDA kernels were built, or why they were not built or did not load
    native_error   why the CPU kernels did not load, or None
    """
    module, error = _native()
    info: dict[str, Any] = {
        "version": version(),
        "compiler": None,
        "isa_built": [],
        "isa": None,
        "isa_reason": error or "",
        "isa_refusals": {},
        "cuda_archs": [],
        "cuda_reason": cuda_error() or "",
        "native_error": error,
    }
    if module is None:
        return info
    info["compiler"] = f"gcc {module.compiler}"
    info["isa_built"] = module.isa_built()
    info["isa_refusals"] = refusals = {level: module.isa_refusal(level) or None for level in module.isa_built()}
    info["cuda_archs"] = [arch for arch in module.cuda_archs.split(";") if arch]
    info["cuda_reason"] = cuda_error() or module.cuda
    if error is None:
        level, best = module.isa(), module.isa_best()
        info["isa"] = level
        if level == best:
            better = [f"{name}: {refusal}" for name, refusal in refusals.items() if refusal]
            info["isa_reason"] = "best level of this CPU" + (f" ({'; '.join(better)})" if better else "")
        else:
            info["isa_reason"] = f"forced by DZ_ISA or use_isa; this CPU also runs {best}"
    return info
