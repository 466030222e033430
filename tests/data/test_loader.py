"""The loader: every image once an epoch, resumable anywhere, augmentation tied to the image."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest
import torch

from deepzero.data import Loader
from deepzero.errors import CheckpointError


def loader(count=10, batch_size=4, **options):
    images = torch.arange(count * 2 * 6 * 6, dtype=torch.float32).view(count, 2, 6, 6)
    return Loader(images, torch.arange(count), batch_size, **options)


def labels(epoch):
    return [y.tolist() for _, y in epoch]


def test_an_epoch_shows_every_image_once_and_keeps_the_smaller_last_batch():
    batches = loader()
    first, second = labels(batches), labels(batches)
    assert [len(b) for b in first] == [4, 4, 2]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(10))
    assert first != second
    assert len(batches) == 3
    assert batches.epoch == 2


def test_order_is_decided_by_the_seed_alone():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = labels(loader(seed=3))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate()
    assert labels(loader(seed=3, crop=2, flip=True)) == first
    assert labels(loader(seed=4)) != first
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_unshuffled_and_dropped():
    assert labels(loader(shuffle=False, drop_last=True)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("stop", range(7))
def test_resuming_after_any_batch_goes_on_bit_for_bit(stop):
    def stream(batches, count):
        found = []
        while len(found) < count:
            for batch in batches:
                found.append(batch)
                if len(found) == count:
                    break
        return found

    straight = stream(loader(crop=1, flip=True, seed=5), 9)
    begun = loader(crop=1, flip=True, seed=5)
    stream(begun, stop)
    resumed = loader(crop=1, flip=True, seed=0)
    resumed.load_state_dict(begun.state_dict())
    for (x, y), (x2, y2) in zip(straight[stop:], stream(resumed, 9 - stop), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_augmented_images_are_windows_of_the_padded_image():
    batches = loader(count=200, batch_size=50, crop=2, flip=True, fill=torch.tensor([-1.0, -2.0]))
    seen = set()
    for images, names in batches:
        for image, name in zip(images, names.tolist(), strict=True):
            padded = torch.empty(2, 10, 10)
            padded[0], padded[1] = -1, -2
            padded[:, 2:8, 2:8] = batches.images[name]
            views = {
                (top, left, mirrored): window.flip(2) if mirrored else window
                for top in range(5)
                for left in range(5)
                for window in [padded[:, top : top + 6, left : left + 6]]
                for mirrored in (False, True)
            }
            found = [key for key, view in views.items() if torch.equal(view, image)]
            assert len(found) == 1
            seen.update(found)
    assert len(seen) > 40  # of 50: all 200 draws alike would show one


def test_an_images_augmentation_does_not_depend_on_its_batch():
    small, large = loader(batch_size=1, crop=2, flip=True), loader(batch_size=10, crop=2, flip=True)
    by_name = {int(y): x[0] for x, y in small}
    ((images, names),) = large
    for image, name in zip(images, names.tolist(), strict=True):
        assert torch.equal(image, by_name[name])


def test_errors():
    with pytest.raises(ValueError, match="got 2 images, 3 labels, batch_size=1"):
        Loader(torch.zeros(2, 1, 1, 1), torch.zeros(3), 1)
    with pytest.raises(ValueError, match="2 images give no batch of 3"):
        Loader(torch.zeros(2, 1, 1, 1), torch.zeros(2), 3, drop_last=True)
    with pytest.raises(
        CheckpointError, match="saved for 10 samples in batches of 4, this loader has 12 in batches of 4"
    ):
        loader(12).load_state_dict(loader(10).state_dict())
