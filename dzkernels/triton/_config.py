"""Block sizes and warps of a launch: the default for its shape, or with DZ_TUNE=1 the fastest of a few, measured once.

The winners are stored in ~/.cache/deepzero/triton.json (or under XDG_CACHE_HOME) by device and version of Triton. Only
parameters on which results do not depend are tuned, so tuning does not change a bit.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .._op import op_of

Config = dict[str, int]  # keyword arguments of the launch: constexpr block sizes, num_warps, num_stages

_tuned: dict[str, Config] = {}


def launch(module: str, shape: Sequence[Any], configs: Sequence[Config], run: Callable[[Config], None]) -> None:
    """Call run(config) with one of `configs`, the first of which is the default.

    The choice is stored for the kernel of `module` (a __name__) and for `shape`, which holds everything that speed
    depends on. A launch that is being captured into a CUDA graph is not measured: it uses the stored choice or the
    default.
    """
    run(_choose(op_of(module), shape, configs, run) if os.environ.get("DZ_TUNE") == "1" else configs[0])


def _choose(name: str, shape: Sequence[Any], configs: Sequence[Config], run: Callable[[Config], None]) -> Config:
    device = _device()
    if device is None:
        return configs[0]
    key = f"{device}: {name} {' '.join(map(str, shape))}"
    if key not in _tuned:
        _tuned.update(_read())
    if _tuned.get(key) not in configs:  # not measured yet, or with other candidates
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        times = [_milliseconds(run, config) for config in configs]
        _tuned[key] = configs[times.index(min(times))]
        _write({**_read(), **_tuned})
    return _tuned[key]


def _device() -> str | None:
    """Name of the GPU and version of Triton; None without a GPU, where nothing can be measured."""
    if not torch.cuda.is_available():
        return None
    import triton

    return f"{torch.cuda.get_device_name()}, triton {triton.__version__}"


def _milliseconds(run: Callable[[Config], None], config: Config) -> float:
    from triton.testing import do_bench

    return do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median")


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepzero" / "triton.json"


def _read() -> dict[str, Config]:
    try:
        tuned = json.loads(_path().read_text())
    except (OSError, ValueError):  # missing, or not written by us
        tuned = None
    return tuned if isinstance(tuned, dict) else {}


def _write(tuned: dict[str, Config]) -> None:
    """Writes atomically. If the cache cannot be written, the next process measures again."""
    try:
        _path().parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=_path().parent)
        with os.fdopen(handle, "w") as file:
            json.dump(tuned, file, indent=1, sort_keys=True)
        os.replace(name, _path())
    except OSError:
        pass
