"""Labelled images: scikit-learn's digits and Fashion-MNIST from idx files."""

from __future__ import annotations

import abc
import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol, cast

import numpy as np

from sparsejax.plugs import ConfigError, check, register

FASHION_MNIST_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"),)  # where Debian's dataset-fashion-mnist puts it


class ImageSet(Protocol):
    """Images with labels, of one size, in two disjoint splits."""

    name: str
    content: ClassVar[str]
    image_shape: tuple[int, int, int]
    num_classes: int

    def size(self, split: str) -> int:
        """Number of images of a split."""
        ...

    def example(self, split: str, index: int) -> tuple[np.ndarray, int]:
        """Image float32[H, W, C] in [0, 1] and its label."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of images and labels."""
        ...


class LoadedImages(abc.ABC):
    """An image set that fits in memory: `load` returns split -> (uint8[N, H, W, C], int[N]), called once, at first use."""

    content: ClassVar[str] = "images"
    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    maximum: int = 255  # the pixel value that becomes 1.0

    @abc.abstractmethod
    def load(self) -> dict[str, tuple[np.ndarray, np.ndarray]]: ...

    @cached_property
    def _splits(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return self.load()

    def size(self, split: str) -> int:
        return len(self._splits[split][1])

    def example(self, split: str, index: int) -> tuple[np.ndarray, int]:
        images, labels = self._splits[split]
        return images[index].astype(np.float32) / np.float32(self.maximum), int(labels[index])

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for images, labels in self._splits.values():
            digest.update(np.ascontiguousarray(images).tobytes())
            digest.update(labels.astype("<i4").tobytes())
        return digest.hexdigest()


class DigitImages(LoadedImages):
    """1,797 handwritten digits, 8 x 8 pixels with 17 grey levels; every fifth is held out for evaluation."""

    name = "digits"
    image_shape = (8, 8, 1)
    num_classes = 10
    maximum = 16

    def load(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = digits.images.astype(np.uint8)[..., None], digits.target
        held_out = np.arange(len(labels)) % 5 == 4
        return {"train": (images[~held_out], labels[~held_out]), "evaluation": (images[held_out], labels[held_out])}


class FashionMnistImages(LoadedImages):
    """60,000 + 10,000 grey images of clothes, 28 x 28 pixels, from four gzipped idx files in one folder."""

    name = "fashion_mnist"
    image_shape = (28, 28, 1)
    num_classes = 10

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {split: (read_idx(self.folder / f"{stem}-images-idx3-ubyte.gz", 3)[..., None],
                        read_idx(self.folder / f"{stem}-labels-idx1-ubyte.gz", 1))
                for split, stem in (("train", "train"), ("evaluation", "t10k"))}


def read_idx(path: Path, rank: int) -> np.ndarray:
    """The uint8 array of `rank` dimensions in a gzipped idx file.

    Raises:
      ConfigError: missing, not gzip, truncated, or of another type or rank.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read as a gzipped idx file ({error})") from error
    check(data[:4] == bytes([0, 0, 8, rank]), "idx file", str(path), f"does not start as {rank}-dimensional unsigned bytes")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", rank, offset=4))
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    check(body.size == np.prod(shape), "idx file", str(path), f"holds {body.size} bytes, its header says {shape}")
    return body.reshape(shape)


@register("source", "digits")
@dataclass(frozen=True)
class Digits:
    """scikit-learn's 8 x 8 handwritten digits."""

    content: ClassVar[str] = "images"

    def open(self, directories: Sequence[Path]) -> ImageSet:
        return DigitImages()


@register("source", "fashion_mnist")
@dataclass(frozen=True)
class FashionMnist:
    """Fashion-MNIST (Xiao et al., 2017, arXiv 1708.07747) from the data folder, from Debian's package, or from TFDS."""

    content: ClassVar[str] = "images"

    def open(self, directories: Sequence[Path]) -> ImageSet:
        for folder in (*(d / "fashion-mnist" for d in directories), *FASHION_MNIST_FOLDERS):
            if (folder / "train-images-idx3-ubyte.gz").is_file():
                return FashionMnistImages(folder)
        from sparsejax.data.tfds_source import open_prepared

        try:
            prepared = open_prepared("fashion_mnist", directories)
        except ConfigError:
            raise ConfigError(
                "data.source = 'fashion_mnist': the images are not on this machine. Either apt-get install "
                f"dataset-fashion-mnist (it installs {FASHION_MNIST_FOLDERS[0]}), or prepare the TFDS data set fashion_mnist "
                "with file_format='array_record'; its four idx .gz files in `fashion-mnist` below the data folder do as "
                "well") from None
        return cast(ImageSet, prepared)
