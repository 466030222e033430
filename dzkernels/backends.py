"""The backends, and the choice between them.

A requested backend (DZ_BACKEND or use_backend) runs or raises. The automatic choice is the first of BACKENDS that can
run the op on these tensors; if that is not the best one for the device, the reason is logged once per op.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _load
from ._load import BackendError
from ._op import kernel as declared_kernel

__all__ = [
    "BACKENDS", "BackendError", "able", "available_backends", "choose", "has_kernel", "implementation", "requested",
    "use_backend", "use_isa",
]  # fmt: skip

BACKENDS = ("cuda", "triton", "cpu", "reference")

_log = logging.getLogger("dzkernels")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("dzkernels_backend", default=None)
_logged: set[str] = set()


def _refuse_cuda(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    if device is not None and device.type != "cuda":
        return f"the tensors are on {device}"
    if device is None and not torch.cuda.is_available():
        return _load.cuda_error() or "torch sees no CUDA device"
    return _load.cuda_error() or _refuse_dtype(dtype)


def _refuse_triton(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _interpreting():
        if device is None and not torch.cuda.is_available():
            return "torch sees no CUDA device"
        if device is not None and device.type != "cuda":
            return f"the tensors are on {device}"
        if not _has_compiler():
            return "triton finds no C compiler: install gcc or set CC"
    return _refuse_dtype(dtype)


@functools.cache
def _has_compiler() -> bool:
    """Whether there is a C compiler. Triton needs one to build the launcher of a kernel on its first run."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def _refuse_cpu(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    if device is not None and device.type != "cpu":
        return f"the tensors are on {device}"
    return _load.native_error() or _refuse_dtype(dtype)


def _refuse_reference(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    return None


def _refuse_dtype(dtype: torch.dtype | None) -> str | None:
    return None if dtype in (None, torch.float32) else f"its kernels are float32, the tensors are {_name(dtype)}"


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


# Why a backend cannot run on a device (None: any) with a dtype (None: any); None if it can.
_REFUSALS: dict[str, Callable[[torch.device | None, torch.dtype | None], str | None]] = {
    "cuda": _refuse_cuda,
    "triton": _refuse_triton,
    "cpu": _refuse_cpu,
    "reference": _refuse_reference,
}


def requested() -> str | None:
    """The backend requested by use_backend or DZ_BACKEND, or None."""
    name = _forced.get() or os.environ.get("DZ_BACKEND")
    return _check_name(name, "DZ_BACKEND") if name else None


def has_kernel(backend: str, op: str) -> bool:
    return declared_kernel(backend, op) is not None


def _refusal(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    kernel = declared_kernel(backend, op)
    if kernel is None:
        return f"it has no kernel for {op}"
    return _REFUSALS[backend](device, None if dtype in kernel.dtypes else dtype)


def able(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends that can run `op` on such tensors, in order of preference; if one is requested, that one or none.

    Includes kernels that run on request only.
    """
    forced = requested()
    names = (forced,) if forced else ("cpu", "reference") if device.type == "cpu" else BACKENDS
    return tuple(name for name in names if _refusal(name, op, device, dtype) is None)


def available_backends() -> tuple[str, ...]:
    """The backends that can run on this machine."""
    return tuple(name for name in BACKENDS if _REFUSALS[name](None, None) is None)


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """In the block, and in this thread, ops run on backend `name` or raise. None restores the automatic choice."""
    token = _forced.set(None if name is None else _check_name(name, "use_backend: name"))
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def use_isa(level: str) -> Iterator[None]:
    """In the block, all threads run the CPU kernels compiled for `level`. For tests and measurements."""
    module = _load.native()
    before = module.isa()
    try:
        module.set_isa(level)
    except ValueError as error:
        raise BackendError(f"use_isa: level {level!r} was requested but {error}") from None
    try:
        yield
    finally:
        module.set_isa(before)


def choose(op: str, device: torch.device, dtype: torch.dtype, *, moments: bool = False) -> str:
    """The backend that runs `op` on such tensors. `moments`: the call requests the moments of the next norm."""
    forced = requested()
    if forced:
        reason = _refusal(forced, op, device, dtype)
        if reason is not None:
            raise BackendError(
                f"dz::{op}: backend {forced!r} was requested but {reason}. "
                f"Available here: {', '.join(available_backends())}"
            )
        return forced
    if device.type == "cpu":  # the common case first: there is no reason to log
        if (refused := _refusal("cpu", op, device, dtype)) is None:
            return "cpu"
        chosen = "reference"
        # float64 is meant for the reference, with which results are compared; that needs no warning
        refusals = {} if dtype is torch.float64 and _load.native_error() is None else {"cpu": refused}
    else:
        refusals, waived = {}, False
        for chosen in BACKENDS:
            kernel = declared_kernel(chosen, op)
            if kernel and kernel.on_request and not (moments and kernel.with_moments):
                waived = not moments
                continue
            refusal = _refusal(chosen, op, device, dtype)
            if refusal is None:
                break
            if chosen != "cpu":
                refusals[chosen] = refusal
        if waived or (chosen == "triton" and not has_kernel("cuda", op)):
            refusals = {}  # a CUDA kernel exists only where it beats Triton's, so Triton is the best choice
    if refusals:
        why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        text = f"dz::{op} runs on backend {chosen!r} because better ones cannot ({why})"
        if text not in _logged:
            _logged.add(text)
            _log.warning(text)
    return chosen


@functools.cache
def implementation(backend: str, op: str) -> Callable[..., Any]:
    """run() of dzkernels/<backend>/<op>.py, or what starts a C++ kernel without such a file."""
    kernel = declared_kernel(backend, op)
    if kernel is not None and kernel.result:
        return importlib.import_module("dzkernels.cpu").direct(op)
    return importlib.import_module(f"dzkernels.{backend}.{op}").run


def run(op: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run `op` on the backend chosen for `tensor`."""
    moments = kwargs.get("next_zc") is not None
    kernel = implementation(choose(op, tensor.device, tensor.dtype, moments=moments), op)
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):  # Triton launches on the current device
            return kernel(*args, **kwargs)
    return kernel(*args, **kwargs)
