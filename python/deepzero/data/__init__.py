"""Image data in memory: what ships inside packages, standard files from a local folder, and a resumable loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import DataError, did_you_mean
from .bundled import digits, mnist5000
from .cifar import cifar10, cifar100
from .idx import fashion_mnist, mnist
from .images import ImageData
from .loader import Loader

BUNDLED: dict[str, Callable[..., ImageData]] = {"digits": digits, "mnist5000": mnist5000}
FROM_FOLDER: dict[str, Callable[..., ImageData]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
}


def load(name: str, *, folder: str | Path | None = None, seed: int = 0) -> ImageData:
    """The data set ``name``. ``folder`` holds the files of sets that no package ships; ``seed`` draws the split of
    sets that come without one.

    Raises DataError for an unknown name, a missing folder or package, and files that are truncated or foreign.
    """
    if name in BUNDLED:
        return BUNDLED[name](seed=seed)
    if name not in FROM_FOLDER:
        known = [*BUNDLED, *FROM_FOLDER]
        hint = did_you_mean(name, known)
        raise DataError(f"data.name = {name!r} is unknown.{hint} Known: {', '.join(known)}.")
    if folder is None:
        raise DataError(
            f"{name} is read from a local folder and none was given. Set data.folder to the folder that holds its "
            f"files, or use a set that ships inside a package: {', '.join(BUNDLED)}."
        )
    return FROM_FOLDER[name](Path(folder))


__all__ = [
    "BUNDLED",
    "FROM_FOLDER",
    "ImageData",
    "Loader",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "load",
    "mnist",
    "mnist5000",
]
