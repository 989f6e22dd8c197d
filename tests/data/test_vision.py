"""Image sources: sizes, splits, and idx files that are absent or damaged."""

import gzip
import struct

import numpy as np
import pytest

from sparsejax.data.vision import FASHION_MNIST_FOLDERS, DigitImages, FashionMnist, read_idx
from sparsejax.plugs import ConfigError


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_fashion_mnist(folder):
    folder.mkdir(parents=True)
    for stem, count in (("train", 7), ("t10k", 3)):
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", np.arange(count * 784).reshape(count, 28, 28) % 256)
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", np.arange(count))


def test_digits_are_1797_images_in_unit_range_of_ten_classes():
    digits = DigitImages()
    sizes = {split: digits.size(split) for split in ("train", "evaluation")}
    assert sum(sizes.values()) == 1797 and sizes["evaluation"] == 359
    images, labels = zip(*(digits.example("train", i) for i in range(300)), strict=True)
    assert np.stack(images).dtype == np.float32 and (np.min(images), np.max(images)) == (0, 1)
    assert images[0].shape == digits.image_shape and set(labels) == set(range(10))


def test_fashion_mnist_is_read_from_the_data_folder(tmp_path):
    write_fashion_mnist(tmp_path / "fashion-mnist")
    images = FashionMnist().open([tmp_path])
    assert images.size("train") == 7 and images.size("evaluation") == 3
    image, label = images.example("evaluation", 2)
    assert image.shape == (28, 28, 1) and label == 2
    assert image[0, 1, 0] == np.float32((2 * 784 + 1) % 256) / np.float32(255)


@pytest.mark.skipif(not FASHION_MNIST_FOLDERS[0].is_dir(), reason="needs the package dataset-fashion-mnist")
def test_fashion_mnist_of_debian_is_whole():
    images = FashionMnist().open([])
    assert (images.size("train"), images.size("evaluation")) == (60_000, 10_000)
    assert images.example("train", 0)[1] == 9


def test_absent_fashion_mnist_names_both_ways_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsejax.data.vision.FASHION_MNIST_FOLDERS", (tmp_path / "none",))
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist.*TFDS data set fashion_mnist"):
        FashionMnist().open([tmp_path])


def test_damaged_idx_files_are_named(tmp_path):
    path = tmp_path / "x.gz"
    write_idx(path, np.zeros((2, 3)))
    assert read_idx(path, 2).shape == (2, 3)
    with pytest.raises(ConfigError, match="x.gz'?: does not start as 1-dimensional"):
        read_idx(path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ConfigError, match="cannot be read as a gzipped idx file"):
        read_idx(path, 2)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(ConfigError, match="holds 5 bytes"):
        read_idx(path, 2)
    with pytest.raises(ConfigError, match="missing.gz"):
        read_idx(tmp_path / "missing.gz", 2)
