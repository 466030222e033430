"""Mini-batches in an order that a seed decides and a checkpoint can resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CheckpointError

# Streams of one seed: the order of an epoch and its augmentation must not be correlated.
_ORDER, _AUGMENT = 1, 2


class Loader:
    """Shuffled mini-batches ``(images [b, C, H, W], labels [b])`` of tensors in memory.

    Iterating gives the rest of the current epoch and then moves on to the next one. The order depends on (seed, epoch)
    alone and the augmentation on (seed, epoch, index of the image) alone, so a resumed loader repeats neither and
    draws nothing from the global random state. The smaller last batch is kept unless ``drop_last``.

    crop  pixels of border (filled with ``fill`` [C], default 0) from which a window of the old size is cut at random
    flip  mirror left to right with probability 1/2
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        crop: int = 0,
        flip: bool = False,
        fill: Tensor | None = None,
    ) -> None:
        if len(images) != len(labels) or batch_size < 1:
            raise ValueError(
                f"Loader: expected as many labels as images and batch_size >= 1, got {len(images)} images, "
                f"{len(labels)} labels, batch_size={batch_size}"
            )
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.shuffle, self.drop_last, self.crop, self.flip = shuffle, drop_last, crop, flip
        self.fill = torch.zeros(images.shape[1]) if fill is None else fill
        self.epoch = 0
        self.position = 0
        if len(self) == 0:
            raise ValueError(f"Loader: {len(images)} images give no batch of {batch_size}")

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        samples = len(self.images)
        order = self._generator(_ORDER).permutation(samples) if self.shuffle else np.arange(samples)
        while self.position < len(self):
            start = self.position * self.batch_size
            self.position += 1
            index = torch.from_numpy(order[start : start + self.batch_size])
            yield self._augmented(index), self.labels[index]
        self.epoch += 1
        self.position = 0

    def _generator(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, stream])

    def _augmented(self, index: Tensor) -> Tensor:
        images = self.images[index]
        if not (self.crop or self.flip):
            return images
        n, channels, height, width = images.shape
        # drawn for every image of the set, so that an image's draw does not depend on the batch it is in
        draws = torch.from_numpy(self._generator(_AUGMENT).integers(0, 1 << 30, (3, len(self.images))))[:, index]
        top, left = draws[0] % (2 * self.crop + 1), draws[1] % (2 * self.crop + 1)
        fill = self.fill.to(images)[:, None, None]
        padded = F.pad(images - fill, (self.crop,) * 4) + fill
        columns = torch.arange(width).expand(n, width)
        if self.flip:
            columns = torch.where(draws[2, :, None] % 2 == 1, columns.flip(1), columns)
        rows = top[:, None] + torch.arange(height)
        columns = left[:, None] + columns
        return padded[
            torch.arange(n)[:, None, None, None],
            torch.arange(channels)[:, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]

    def state_dict(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "samples": len(self.images),
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; CheckpointError when it counts batches of other data."""
        ours = {"samples": len(self.images), "batch_size": self.batch_size}
        theirs = {key: state[key] for key in ours}
        if ours != theirs:
            raise CheckpointError(
                f"the sampler's position was saved for {theirs['samples']:,} samples in batches of "
                f"{theirs['batch_size']}, this loader has {ours['samples']:,} in batches of {ours['batch_size']}. "
                "Resume with the same data and batch size."
            )
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
