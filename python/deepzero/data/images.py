"""Images and labels of a train and a test split, normalised once and kept in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError

Array = NDArray[Any]


@dataclass(frozen=True)
class ImageData:
    """Two splits of square images, normalised by the channel means and deviations of the train split.

    train_images, test_images  [n, C, S, S] float32
    train_labels, test_labels  [n] int64 in 0 .. num_classes - 1
    black                      [C] float32, the normalised value of a zero pixel: what a padded border is filled with
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    black: Tensor

    @property
    def in_channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train_images.shape[2]

    @classmethod
    def from_pixels(
        cls, name: str, train: tuple[Array, Array], test: tuple[Array, Array], num_classes: int
    ) -> ImageData:
        """Build from (images [n, C, S, S], labels [n]) pairs of numpy arrays."""
        train_images, test_images = (torch.from_numpy(np.ascontiguousarray(x, np.float32)) for x, _ in (train, test))
        train_labels, test_labels = (torch.from_numpy(np.ascontiguousarray(y, np.int64)) for _, y in (train, test))
        mean = train_images.mean((0, 2, 3), keepdim=True)
        std = train_images.std((0, 2, 3), keepdim=True)
        return cls(
            name,
            (train_images - mean) / std,
            train_labels,
            (test_images - mean) / std,
            test_labels,
            num_classes,
            (-mean / std).flatten(),
        )


def stratified_split(labels: Array, test_fraction: float, seed: int) -> tuple[Array, Array]:
    """Indices of a train and a test part in which every class keeps its share; both shuffled."""
    generator = np.random.default_rng([seed, 0])
    train, test = [], []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held_out = round(test_fraction * len(members))
        test.append(members[:held_out])
        train.append(members[held_out:])
    return generator.permutation(np.concatenate(train)), generator.permutation(np.concatenate(test))


def check_labels(labels: Array, num_classes: int, where: str) -> None:
    """DataError when a label is outside 0 .. num_classes - 1: the file is not what its name says."""
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise DataError(
            f"{where}: expected labels 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}. This is another "
            "data set or a damaged file: fetch it again."
        )
