"""MNIST and Fashion-MNIST from their idx files, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from ..errors import DataError
from .images import Array, ImageData, check_labels

UNSIGNED_BYTES = 8


def mnist(folder: Path) -> ImageData:
    """MNIST: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k`` files, ``.gz`` or not."""
    return _read_set("mnist", folder)


def fashion_mnist(folder: Path) -> ImageData:
    """Fashion-MNIST; the same file names as MNIST."""
    return _read_set("fashion-mnist", folder)


def _read_set(name: str, folder: Path) -> ImageData:
    if not folder.is_dir():
        raise DataError(f"{name}: {folder} is not a folder. Give the folder that holds train-images-idx3-ubyte(.gz).")
    train, test = (_read_split(name, folder, split) for split in ("train", "t10k"))
    return ImageData.from_pixels(name, train, test, 10)


def _read_split(name: str, folder: Path, split: str) -> tuple[Array, Array]:
    image_file, label_file = (_find(name, folder, f"{split}-{part}") for part in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels):
        raise DataError(
            f"{label_file}: expected one label for each of the {len(images):,} images in {image_file.name}, got "
            f"{len(labels):,}. The files are of different sets."
        )
    if images.shape[1] != images.shape[2]:
        raise DataError(f"{image_file}: expected square images, got {images.shape[1]}x{images.shape[2]}.")
    check_labels(labels, 10, str(label_file))
    return images[:, None], labels


def _find(name: str, folder: Path, stem: str) -> Path:
    for spelling in (f"{stem}-ubyte", f"{stem.replace('-idx', '.idx')}-ubyte"):
        for path in (folder / spelling, folder / f"{spelling}.gz"):
            if path.is_file():
                return path
    raise DataError(f"{name}: no {stem}-ubyte or {stem}-ubyte.gz in {folder}. Put the published files there.")


def read_idx(path: Path, dimensions: int) -> Array:
    """The uint8 array of an idx file: two zero bytes, type 8, the number of dimensions, big-endian sizes, values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as damaged:
        raise DataError(
            f"{path}: expected a gzip file, reading it failed with: {damaged}. Fetch it again."
        ) from damaged
    start = 4 + 4 * dimensions
    magic = bytes([0, 0, UNSIGNED_BYTES, dimensions])
    if content[:4] != magic or len(content) < start:
        raise DataError(
            f"{path}: expected an idx file of bytes with {dimensions} dimension(s), starting {magic.hex()}, got "
            f"{content[:4].hex() or 'an empty file'}. This is a foreign file: fetch it again."
        )
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path}: its header promises {math.prod(shape):,} values of shape {shape}, got {len(content) - start:,}. "
            "The file is truncated or damaged: fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
