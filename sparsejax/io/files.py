"""The files of a model that is given as a folder or as a zip archive, without ever unpacking the archive into a folder."""

from __future__ import annotations

import json
import reprlib
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparsejax.plugs import ConfigError, check

MAX_TEXT = 2**28  # bytes of a JSON or template file; the largest published tokenizer.json has 40 MB
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field that follow
COPY_BLOCK = 2**16  # zipfile holds about four of them


class Files(Protocol):
    """The plain files that lie side by side in one folder, on disk or in an archive."""

    path: Path
    names: frozenset[str]

    def where(self, name: str) -> str:
        """The file as messages call it."""
        ...

    def size(self, name: str) -> int:
        """Its bytes, when unpacked."""
        ...

    def head(self, name: str, count: int) -> bytes:
        """Its first `count` bytes, fewer where it is shorter."""
        ...

    def mapped(self, name: str) -> np.ndarray:
        """The whole file as read-only uint8[size], mapped and not read; it must not be empty."""
        ...


def open_files(path: Path) -> Files:
    """The files of a folder, or of the one folder inside a zip archive that holds a model.

    Raises:
      ConfigError: neither of both, a broken archive, or one that holds several models.
    """
    if path.is_dir():
        return FolderFiles(path)
    check(path.is_file(), "path", str(path), "there is no such file or folder")
    check(zipfile.is_zipfile(path), "path", str(path), "neither a folder nor a zip archive, or an archive that is truncated")
    return ZipFiles(path)


class FolderFiles:
    """Files of a folder on disk."""

    def __init__(self, path: Path):
        self.path = path
        with _readable(str(path)):
            self.names = frozenset(entry.name for entry in path.iterdir() if entry.is_file())

    def where(self, name: str) -> str:
        return str(self.path / name)

    def size(self, name: str) -> int:
        with _readable(self.where(name)):
            return (self.path / name).stat().st_size

    def head(self, name: str, count: int) -> bytes:
        with _readable(self.where(name)), open(self.path / name, "rb") as file:
            return file.read(count)

    def mapped(self, name: str) -> np.ndarray:
        with _readable(self.where(name)):
            return np.memmap(self.path / name, np.uint8, "r")


class ZipFiles:
    """Files of the one folder of an archive that holds a model.

    That folder is the archive's root where it holds both a config.json and safetensors, else the only folder that does; an
    archive without such a folder is taken by its safetensors alone, then by its config.json alone. Stored members are mapped
    where they lie; deflated ones are unpacked once into an unnamed temporary file (below $TMPDIR), which is mapped.
    """

    def __init__(self, path: Path):
        self.path = path
        with _readable(str(path)), zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
        by_name: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            check(member.filename not in by_name, f"{path}: member", member.filename, "the archive holds two of this name")
            by_name[member.filename] = member
        self._root = _model_folder(path, by_name)
        self._members = {
            name.removeprefix(self._root): member
            for name, member in by_name.items()
            if name.startswith(self._root) and "/" not in name.removeprefix(self._root)
        }
        self.names = frozenset(self._members)

    def where(self, name: str) -> str:
        return f"{self.path}:{self._root}{name}"

    def size(self, name: str) -> int:
        return self._members[name].file_size

    def head(self, name: str, count: int) -> bytes:
        with _readable(self.where(name)), zipfile.ZipFile(self.path) as archive, archive.open(self._members[name]) as file:
            return file.read(count)

    def mapped(self, name: str) -> np.ndarray:
        member = self._members[name]
        if member.compress_type == zipfile.ZIP_STORED:
            return self._mapped_in_place(name, member)
        with _readable(self.where(name)), tempfile.TemporaryFile() as unpacked:
            with zipfile.ZipFile(self.path) as archive, archive.open(member) as file:
                shutil.copyfileobj(file, unpacked, COPY_BLOCK)
            unpacked.flush()
            check(unpacked.tell() == member.file_size, self.where(name), unpacked.tell(),
                  f"unpacks to this number of bytes, the archive says {member.file_size}")
            return np.memmap(unpacked, np.uint8, "r")

    def _mapped_in_place(self, name: str, member: zipfile.ZipInfo) -> np.ndarray:
        where = self.where(name)
        with _readable(where), open(self.path, "rb") as file:
            file.seek(member.header_offset)
            local = file.read(LOCAL_HEADER.size)
            begins = len(local) == LOCAL_HEADER.size and local[:4] == b"PK\3\4"
            check(begins, where, member.header_offset, "the archive is damaged: no member starts at this byte")
            check(not member.flag_bits & 1, where, "encrypted", "encrypted archives are not read")
            _, name_length, extra_length = LOCAL_HEADER.unpack(local)
            start = member.header_offset + LOCAL_HEADER.size + name_length + extra_length
            check(start + member.file_size <= self.path.stat().st_size and member.file_size == member.compress_size,
                  where, member.file_size, "the archive is truncated: it ends before this member does")
            return np.memmap(self.path, np.uint8, "r", offset=start, shape=(member.file_size,))


def _model_folder(path: Path, names: Iterable[str]) -> str:
    """`"a/b/"`, or `""` for the root."""
    with_config, with_weights = set(), set()
    for name in names:
        folder, slash, plain = name.rpartition("/")
        if plain == "config.json":
            with_config.add(folder + slash)
        elif plain.endswith(".safetensors"):
            with_weights.add(folder + slash)
    found = with_config & with_weights or with_weights or with_config or {""}
    if "" in found:
        return ""
    check(len(found) == 1, "archive", str(path), f"holds several models, in {listed(found)}; expected one")
    return found.pop()


def read_text(files: Files, name: str) -> str:
    """A UTF-8 file.

    Raises:
      ConfigError: not UTF-8, or larger than any such file is.
    """
    size = files.size(name)
    check(size <= MAX_TEXT, files.where(name), f"{size} bytes", f"expected at most {MAX_TEXT}")
    try:
        return files.head(name, size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{files.where(name)}: not UTF-8 at byte {error.start} ({error.reason})") from error


def read_object(files: Files, name: str) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
      ConfigError: no such JSON, or a key that it gives twice.
    """
    return parse_object(read_text(files, name), files.where(name))


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object of a text; `where` is for the message.

    Raises:
      ConfigError: invalid JSON, another JSON value, a repeated key, or nesting without end.
    """

    def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ConfigError(f"{where}: the key {repeated!r} is given twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=without_repetition, parse_constant=_refuse_constant)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # a JSONDecodeError, bytes that are not UTF-8, a number of 5000 digits
        raise ConfigError(f"{where}: not valid JSON ({error})") from error
    check(isinstance(value, dict), where, type(value).__name__, "expected a JSON object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def refuse_unless(condition: Any, where: str, value: Any, rule: str) -> None:
    """`plugs.check` for what a file holds: the value, which may have millions of characters, is shown in short."""
    if not condition:
        raise ConfigError(f"{where} = {reprlib.repr(value)}: {rule}")


def listed(names: Iterable[str], most: int = 5) -> str:
    """`'a', 'b' and 3 more`, sorted."""
    names = sorted(names)
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "nothing"


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Whatever an unreadable file or a broken archive raises, as a ConfigError that names the file."""
    try:
        yield
    except ConfigError:
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError) as error:
        raise ConfigError(f"{where}: the archive is damaged ({error})") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile: another compression, a password
        raise ConfigError(f"{where}: stored in a way that is not read, expected plain or deflated members ({error})") from error
    except (OSError, ValueError, OverflowError) as error:  # numpy and zipfile say ValueError to offsets that make no sense
        raise ConfigError(f"{where}: cannot be read ({error})") from error
