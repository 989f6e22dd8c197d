"""Local files as TFDS data sets in array_record: prepared once without TensorFlow, then read as `tfds:NAME`.

    python -m sparsejax.data.tfds_builders text NAME DATA_DIR FILE [FILE ...]
    python -m sparsejax.data.tfds_builders images NAME DATA_DIR FOLDER

Text: each file is a document, and each line of a .jsonl file is one (its field `text`). Images: FOLDER/LABEL/*.png or .jpg.
Every tenth example, by a hash of its name, is held out as the split `test`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsejax.data.sources import decode_utf8, find_file
from sparsejax.plugs import ConfigError, check

Examples = Callable[[], Iterator[tuple[str, dict[str, Any]]]]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def prepare_text(name: str, files: Sequence[Path | str], data_dir: Path | str) -> Path:
    """Prepare text files as the TFDS data set `name`.

    Args:
      name: lower-case name, as in `tfds:NAME`.
      files: UTF-8 text files, or .jsonl files whose lines have a string field `text`.
      data_dir: folder that receives NAME/VERSION.
    Returns:
      The folder of the prepared set.
    Raises:
      ConfigError: a missing, empty or invalid file (file and offset or line are named), or a bad name.
    """
    import tensorflow_datasets as tfds

    paths = [find_file(str(f), (), "files") for f in files]
    for _ in _text_examples(paths):  # everything is checked before anything is written
        pass
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    return _prepare(name, features, lambda: _text_examples(paths), data_dir)


def prepare_images(name: str, folder: Path | str, data_dir: Path | str) -> Path:
    """Prepare `folder/LABEL/*.png|jpg` as the TFDS image set `name`; images keep their size, greyscale stays one channel.

    Raises:
      ConfigError: no label folders, no images, or a file that is not an image.
    """
    import tensorflow_datasets as tfds

    root = Path(folder)
    labels = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    check(labels, "folder", str(folder), "needs one folder per label")
    paths = sorted(p for p in root.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
    check(paths, "folder", str(folder), f"its label folders hold no {', '.join(IMAGE_SUFFIXES)}")
    shapes = {_image_shape(path) for path in paths}
    channels = 1 if all(s[2] == 1 for s in shapes) else 3
    size = next(iter(shapes))[:2] if len({s[:2] for s in shapes}) == 1 else (None, None)
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(*size, channels), encoding_format="png"),
                                           "label": tfds.features.ClassLabel(names=labels)})
    return _prepare(name, features, lambda: _image_examples(paths, channels), data_dir)


def _prepare(name: str, features: Any, examples: Examples, data_dir: Path | str) -> Path:
    import tensorflow_datasets as tfds

    check(name.isidentifier() and name == name.lower(), "name", name, "lower-case letters, digits and underscores are allowed")

    class LocalFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # TFDS 4.9.10 needs importlib_resources to find it, which it does not install

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _: Any) -> Any:
            held_out = {key for key, _ in examples() if _held_out(key)}
            check(any(key not in held_out for key, _ in examples()), "name", name, "no example is left for the training split")
            splits = {"train": self._generate_examples(lambda key: key not in held_out)}
            return {**splits, "test": self._generate_examples(held_out.__contains__)} if held_out else splits

        def _generate_examples(self, wanted: Any) -> Any:
            return ((key, example) for key, example in examples() if wanted(key))

    LocalFiles.name = name
    builder = LocalFiles(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def _held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % 10 == 0


def _text_examples(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, path in enumerate(paths):
        text = decode_utf8(path.read_bytes(), path)
        if path.suffix != ".jsonl":
            yield f"{number}:{path.name}", {"text": text}
            continue
        for line_number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"{number}:{path.name}:{line_number}", {"text": _text_field(line, f"{path}:{line_number}")}


def _text_field(line: str, place: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{place}: expected a JSON object with a field 'text' ({error})") from error
    check(isinstance(text, str), place, type(text).__name__, "the field 'text' must be a string")
    return text


def _image_shape(path: Path) -> tuple[int, int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.height, image.width, 1 if image.mode in ("1", "L") else 3
    except UnidentifiedImageError as error:
        raise ConfigError(f"{path}: not an image") from error


def _image_examples(paths: Sequence[Path], channels: int) -> Iterator[tuple[str, dict[str, Any]]]:
    from PIL import Image

    for path in paths:
        png = io.BytesIO()  # TFDS encodes arrays with TensorFlow, but takes encoded files as they are
        with Image.open(path) as image:
            image.convert("L" if channels == 1 else "RGB").save(png, "PNG")
        png.seek(0)
        yield f"{path.parent.name}/{path.name}", {"image": png, "label": path.parent.name}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module; 0 when the set is prepared, 2 with one message when it is refused."""
    parser = argparse.ArgumentParser(description="Prepare local files as a TFDS data set in array_record.")
    parser.add_argument("kind", choices=("text", "images"))
    parser.add_argument("name")
    parser.add_argument("data_dir")
    parser.add_argument("inputs", nargs="+", help="text files, or one folder of label folders")
    given = parser.parse_args(arguments)
    try:
        if given.kind == "images":
            check(len(given.inputs) == 1, "images", given.inputs, "takes one folder")
            folder = prepare_images(given.name, given.inputs[0], given.data_dir)
        else:
            folder = prepare_text(given.name, given.inputs, given.data_dir)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"prepared {folder}: use it as tfds:{given.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
