"""Checkpoint files: written whole or not at all, read without executing code."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError

FORMAT_VERSION = 1


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write ``state`` (plain types and tensors) to ``path``, keeping the file it replaces as ``previous.pt`` beside it.

    At every moment ``path`` is a whole file, the old one or the new one; a failed save leaves the old one.
    """
    memory = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **state}, memory)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _replace(path.with_name("previous.pt"), path.read_bytes())
    _replace(path, memory.getvalue())


def copy(source: Path, target: Path) -> None:
    """Copy a checkpoint, as safely as :func:`save` writes one."""
    _replace(target, source.read_bytes())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """The state saved in ``path``, on the CPU.

    Raises CheckpointError when it is missing, damaged, foreign, would run code or comes from a newer version; the text
    names the previous good checkpoint where there is one. Nothing is fallen back on silently.
    """
    try:
        return _read(path)
    except CheckpointError as bad:
        for other in (path.with_name("previous.pt"), path.with_name("best.pt")):
            if other == path:
                continue
            try:
                step = _read(other)["counters"]["step"]
            except CheckpointError:
                continue
            raise CheckpointError(
                f"{bad} The checkpoint {other} (step {step:,}) is good: to go on from it, copy it over {path.name}."
            ) from bad
        raise


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as missing:
        raise CheckpointError(f"{path}: there is no readable checkpoint here ({missing.strerror}).") from missing
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()  # torch does not verify the checksums it writes
        if damaged is not None:
            raise CheckpointError(f"{path}: the checkpoint is corrupted: the checksum of {damaged} does not match.")
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as broken:
        raise CheckpointError(
            f"{path}: expected a checkpoint of {len(content):,} whole bytes, but it is truncated, corrupted or another "
            f"kind of file ({broken})."
        ) from broken
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as refused:
        raise CheckpointError(
            f"{path}: this file holds more than tensors and plain types, and reading that could run code; it was not "
            "read. deepzero never writes such a file."
        ) from refused
    except (RuntimeError, ValueError, KeyError, EOFError) as broken:
        raise CheckpointError(f"{path}: expected a checkpoint, reading it failed with: {broken}") from broken
    if not isinstance(state, dict) or not isinstance(state.get("format_version"), int):
        raise CheckpointError(f"{path}: this file was not written by deepzero: it has no format_version.")
    if state["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: the checkpoint has format_version {state['format_version']}, this deepzero reads up to "
            f"{FORMAT_VERSION}. Install the deepzero that wrote it (see its 'versions') or a newer one."
        )
    return state


def random_state() -> dict[str, Any]:
    """The random state of torch, CUDA, numpy and python, as tensors and plain types."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])
