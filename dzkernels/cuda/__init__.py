"""CUDA kernels: allocate the result and pass addresses to dzkernels._cuda, on the current stream."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .._load import BackendError, cuda_library
from .._op import op_of


def launch(module: str, *args: Tensor | int | float | None) -> None:
    """Call dz_<op> with the addresses of tensors (None: null), 64-bit integers and doubles, on the current stream.
    `module` is the __name__ of the file <op>.py that calls."""
    op = op_of(module)
    library = cuda_library()
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    converted: list[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double] = []
    for arg in args:
        if arg is None:
            converted.append(ctypes.c_void_p(None))
        elif isinstance(arg, Tensor):
            converted.append(ctypes.c_void_p(arg.data_ptr()))
        elif isinstance(arg, float):
            converted.append(ctypes.c_double(arg))
        else:
            converted.append(ctypes.c_int64(arg))
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        code = getattr(library, f"dz_{op}")(*converted, stream)
    if code != 0:
        text = library.dz_cuda_error
        text.restype = ctypes.c_char_p
        raise RuntimeError(f"dz::{op}: the CUDA launch failed: {text(code).decode()} (error {code})")


def refused(module: str, reason: str) -> BackendError:
    """The error of a kernel that does not take these arguments."""
    return BackendError(f"dz::{op_of(module)}: backend 'cuda' was requested but {reason}")
