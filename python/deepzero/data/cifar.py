"""CIFAR-10 and CIFAR-100 from the files their authors publish, in the binary or the python version."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import DataError
from .images import Array, ImageData, check_labels

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """Files of one data set: their names without ``.bin``, images in each, label bytes before each image."""

    name: str
    num_classes: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    train_count: int
    test_count: int
    label_bytes: int
    label_key: bytes
    home: str


CIFAR10 = Layout(
    "cifar10",
    10,
    tuple(f"data_batch_{i}" for i in range(1, 6)),
    ("test_batch",),
    10_000,
    10_000,
    1,
    b"labels",
    "cifar-10-batches",
)
CIFAR100 = Layout("cifar100", 100, ("train",), ("test",), 50_000, 10_000, 2, b"fine_labels", "cifar-100")


def cifar10(folder: Path) -> ImageData:
    """CIFAR-10: 50,000 + 10,000 colour images, 32x32: ``data_batch_1 .. 5``, ``test_batch``, as ``.bin`` or pickles."""
    return read(CIFAR10, folder)


def cifar100(folder: Path) -> ImageData:
    """CIFAR-100 with its 100 fine labels, from ``train`` and ``test`` (``.bin`` or pickles)."""
    return read(CIFAR100, folder)


def read(layout: Layout, folder: Path) -> ImageData:
    """Both splits, from ``folder`` itself or from the folder inside it that the published archive unpacks to."""
    if not folder.is_dir():
        raise DataError(
            f"{layout.name}: {folder} is not a folder. Give the folder that holds {layout.train[0]}.bin (binary "
            f"version) or {layout.train[0]} (python version)."
        )
    for place in (folder, *sorted(folder.glob(f"{layout.home}*"))):
        for suffix, reader in ((".bin", _read_binary), ("", _read_pickle)):
            if (place / f"{layout.train[0]}{suffix}").is_file():
                train, test = (
                    _join([reader(layout, place / f"{name}{suffix}", count) for name in names])
                    for names, count in ((layout.train, layout.train_count), (layout.test, layout.test_count))
                )
                return ImageData.from_pixels(layout.name, train, test, layout.num_classes)
    raise DataError(
        f"{layout.name}: no {layout.train[0]}.bin (binary version) and no {layout.train[0]} (python version) in "
        f"{folder} or in a {layout.home}* folder inside it. Unpack the published archive there."
    )


def _join(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images).reshape(-1, 3, 32, 32), np.concatenate(labels)


def _open(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as missing:
        raise DataError(f"{path} is missing beside the other files. Unpack the published archive again.") from missing


def _read_binary(layout: Layout, path: Path, count: int) -> tuple[Array, Array]:
    record = layout.label_bytes + PIXELS
    content = _open(path)
    if len(content) != count * record:
        raise DataError(
            f"{path}: expected {count:,} records of {record} bytes = {count * record:,} bytes, got {len(content):,} "
            "bytes. The file is truncated or not the binary version: fetch it again."
        )
    table = np.frombuffer(content, np.uint8).reshape(count, record)
    labels = table[:, layout.label_bytes - 1]
    check_labels(labels, layout.num_classes, str(path))
    return table[:, layout.label_bytes :], labels


def _read_pickle(layout: Layout, path: Path, count: int) -> tuple[Array, Array]:
    try:
        content = _ArraysOnly(io.BytesIO(_open(path)), encoding="bytes").load()
    except DataError:
        raise
    except Exception as damaged:  # a damaged pickle may raise anything
        raise DataError(
            f"{path}: expected a pickle of the python version, reading it failed with: {damaged}. The file is "
            "truncated or foreign: fetch it again."
        ) from damaged
    images, labels = (content.get(key) if isinstance(content, dict) else None for key in (b"data", layout.label_key))
    if not isinstance(images, np.ndarray) or labels is None or images.dtype != np.uint8:
        raise DataError(
            f"{path}: expected a dictionary with {layout.label_key.decode()!r} and uint8 'data', got something else. "
            "This is another data set's file: fetch it again."
        )
    if images.shape != (count, PIXELS) or len(labels) != count:
        raise DataError(
            f"{path}: expected {count:,} images of {PIXELS} bytes with labels, got data of shape {images.shape} and "
            f"{len(labels):,} labels. Fetch the file again."
        )
    labels = np.asarray(labels)
    check_labels(labels, layout.num_classes, str(path))
    return images, labels


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_EMPTY: Any = np.zeros(0)


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds plain types and numpy arrays; any other name in the file is refused, so no code can run."""

    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("_codecs", "encode"): _latin1,
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
        # what numpy itself pickles an array with, in the old and the new protocol, before and after numpy 2
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _EMPTY.__reduce_ex__(2)[0] for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): _EMPTY.__reduce_ex__(5)[0] for core in ("core", "_core")},
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.allowed[module, name]
        except KeyError:
            raise DataError(
                f"the pickle asks for {module}.{name}, which no CIFAR file needs; it was not run. Fetch the file again "
                "from a source you trust."
            ) from None
