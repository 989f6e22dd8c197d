"""Data sets of TensorFlow Datasets, read by random access from array_record files, without TensorFlow.

Text sets become documents, image sets labelled images. A set is looked for below `tfds` in the data folders, in the data
folders themselves, and where TFDS keeps its own (`$TFDS_DATA_DIR`, else ~/tensorflow_datasets). `tfds_builders` prepares local
files.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sparsejax.data.sources import SPLITS, TextCorpus
from sparsejax.data.vision import ImageSet
from sparsejax.plugs import ConfigError, check, register

EVALUATION_SPLITS = ("validation", "valid", "test")  # the first that a data set has; else the last tenth of its training split


class Part(Sequence[Any]):
    """A range of a random-access source, decoded by `decode`."""

    def __init__(self, source: Any, start: int, stop: int, decode: Any):
        self._source, self._start, self._stop, self._decode = source, start, stop, decode

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._decode(self._source[self._start + int(index)])


class PreparedSet(abc.ABC):
    """A prepared TFDS data set; opening it reads its description alone, no examples."""

    def __init__(self, builder: Any):
        self.builder = builder
        self.name = f"tfds:{builder.info.full_name}"

    @cached_property
    def _parts(self) -> dict[str, Part]:
        held_out = next((s for s in EVALUATION_SPLITS if s in self.builder.info.splits), None)
        if held_out is None and not self.builder.info.splits:  # a mocked set does not know its splits; every name works there
            held_out = "test"
        train = self._source("train")
        if held_out:
            test = self._source(held_out)
            return {"train": Part(train, 0, len(train), self.decode), "evaluation": Part(test, 0, len(test), self.decode)}
        cut = len(train) * 9 // 10
        check(0 < cut < len(train), "data.source", self.name, "too few examples for a training and an evaluation split")
        return {"train": Part(train, 0, cut, self.decode), "evaluation": Part(train, cut, len(train), self.decode)}

    def _source(self, split: str) -> Any:
        try:
            return self.builder.as_data_source(split)
        except (AssertionError, NotImplementedError, OSError, ValueError, KeyError) as error:
            raise ConfigError(f"data.source = {self.name!r}: split {split!r} cannot be read: {error}") from error

    @abc.abstractmethod
    def decode(self, example: dict[str, Any]) -> Any: ...

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the set's name, version and splits, and of the first and last example of each."""
        digest = hashlib.sha256(self.name.encode())
        for split in SPLITS:
            part = self._parts[split]
            digest.update(f"\x00{split}\x00{len(part)}\x00".encode())
            for example in (part[0], part[len(part) - 1]):
                values = example if isinstance(example, tuple) else (example.encode(),)
                for value in values:
                    digest.update(np.asarray(value).tobytes())
        return digest.hexdigest()


class PreparedText(PreparedSet):
    """Documents of a TFDS text set."""

    content: ClassVar[str] = "text"

    def __init__(self, builder: Any, feature: str):
        super().__init__(builder)
        self.feature = feature

    def decode(self, example: dict[str, Any]) -> str:
        value = example[self.feature]
        return value if isinstance(value, str) else bytes(value).decode("utf-8", "replace")

    def documents(self, split: str) -> Sequence[str]:
        return self._parts[split]

    @cached_property
    def size_bytes(self) -> int:
        size = self.builder.info.dataset_size
        return int(size) if size else sum(len(d.encode()) for split in SPLITS for d in self._parts[split])


class PreparedImages(PreparedSet):
    """Labelled images of a TFDS set, resized where `size` is given."""

    content: ClassVar[str] = "images"

    def __init__(self, builder: Any, image: str, label: str, size: int):
        super().__init__(builder)
        self.image, self.label, self.resize_to = image, label, size
        self.num_classes = int(builder.info.features[label].num_classes)
        height, width, channels = builder.info.features[image].shape
        if size:
            height = width = size
        check(height and width and channels, "data.source", self.name,
              "its images differ in size; give one, e.g. tfds:NAME,size=64")
        self.image_shape = (int(height), int(width), int(channels))

    def decode(self, example: dict[str, Any]) -> tuple[np.ndarray, int]:
        image = np.asarray(example[self.image])
        if self.resize_to:
            image = resized(image, self.resize_to)
        return image, int(example[self.label])

    def size(self, split: str) -> int:
        return len(self._parts[split])

    def example(self, split: str, index: int) -> tuple[np.ndarray, int]:
        image, label = self._parts[split][index]
        return image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max), label


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """uint8[H, W, C] -> uint8[size, size, C]: the largest centred square, resampled bilinearly."""
    from PIL import Image

    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = image[top:top + side, left:left + side]
    picture = Image.fromarray(square[..., 0] if image.shape[-1] == 1 else square)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, image.shape[-1])


def open_prepared(name: str, directories: Sequence[Path], size: int = 0) -> TextCorpus | ImageSet:
    """The TFDS data set `name` (`NAME`, `NAME/CONFIG`, `NAME:VERSION`) as text or images.

    Raises:
      ConfigError: not prepared (the places and the way to prepare it are named), not in array_record, neither text nor images.
    """
    import tensorflow_datasets as tfds

    builder = _find_builder(name, directories)
    features = builder.info.features
    kinds = {key: type(feature) for key, feature in features.items()}
    image = next((k for k, kind in kinds.items() if issubclass(kind, tfds.features.Image)), None)
    label = next((k for k, kind in kinds.items() if issubclass(kind, tfds.features.ClassLabel)), None)
    if image and label:
        return PreparedImages(builder, image, label, size)
    texts = [k for k, kind in kinds.items() if issubclass(kind, tfds.features.Text)]
    check(texts, "data.source", f"tfds:{name}", f"has neither text nor labelled images; its features are {', '.join(features)}")
    check(not size, "data.source", f"tfds:{name}", "size is for images")
    return PreparedText(builder, "text" if "text" in texts else texts[0])


def _find_builder(name: str, directories: Sequence[Path]) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    places = [p for d in directories for p in (d / "tfds", d) if p.is_dir()]
    for place in [*places, None]:
        try:
            return builder_from_files(name, **({"data_dir": place} if place else {}))
        except DatasetNotFoundError:
            continue
    default = Path(tfds.core.constants.DATA_DIR)
    looked = ", ".join(str(p) for p in [*places, default])
    problem = (f"data.source = 'tfds:{name}': not prepared in array_record; looked in {looked}. Prepare it once with "
               f"tfds.builder({name!r}, file_format='array_record').download_and_prepare(), "
               "or local files with python -m sparsejax.data.tfds_builders")
    try:
        builder = tfds.builder(name, file_format="array_record")
        builder.as_data_source("train")
    except (DatasetNotFoundError, AssertionError, NotImplementedError, OSError, ValueError, KeyError) as error:
        raise ConfigError(problem) from error
    return builder


@register("source", "tfds")
@dataclass(frozen=True)
class Tfds:
    """A prepared TFDS text or image set; `size` resizes images."""

    name: str
    size: int = 0
    content: ClassVar[str] = ""  # known once it is opened

    def __post_init__(self) -> None:
        check(self.size >= 0, "data.source: tfds.size", self.size, "must not be negative")

    def open(self, directories: Sequence[Path]) -> TextCorpus | ImageSet:
        return open_prepared(self.name, directories, self.size)
