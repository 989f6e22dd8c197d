"""Where the data comes from: text that ships with Python, text files, and how a data file is found.

A source spec (`"stdlib"`, `"text:PATH"`, ...) is a frozen dataclass; `open` checks what is cheap to check and returns an object
that reads its data at first use. `content` says what it holds: `text` (documents), `images`, or `symbols` (synthetic tasks).
"""

from __future__ import annotations

import abc
import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

from sparsejax.plugs import ConfigError, check, register

SPLITS = ("train", "evaluation")


class TextCorpus(Protocol):
    """Documents in two disjoint splits, `train` and `evaluation`."""

    name: str
    content: ClassVar[str]

    def documents(self, split: str) -> Sequence[str]:
        """All documents of a split, in a fixed order."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the text of both splits."""
        ...

    @property
    def size_bytes(self) -> int:
        """UTF-8 bytes of both splits, or an upper estimate where counting them would mean reading everything."""
        ...


def data_directories(data_dir: str = "") -> tuple[Path, ...]:
    """Folders in which data files are looked for, in order: `data_dir`, $SPARSEJAX_DATA, ./shared/data, ../shared/data.

    Raises:
      ConfigError: `data_dir` was given and is not a folder.
    """
    if data_dir:
        check(Path(data_dir).is_dir(), "data.data_dir", data_dir, "there is no such folder")
        return (Path(data_dir),)
    found = [Path(p) for p in (os.environ.get("SPARSEJAX_DATA", ""), "shared/data", "../shared/data") if p]
    return tuple(p for p in found if p.is_dir())


def find_file(path: str, directories: Sequence[Path], field: str) -> Path:
    """The file `path` as given, or else below the first of `directories` that has it.

    Raises:
      ConfigError: not found anywhere (all tried places are named), not a file, or empty.
    """
    tried = [Path(path).expanduser()]
    if not tried[0].is_absolute():
        tried += [d / path for d in directories]
    for candidate in tried:
        if candidate.is_dir():
            raise ConfigError(f"{field} = {path!r}: {candidate} is a folder, a file is needed")
        if candidate.is_file():
            check(candidate.stat().st_size, field, path, f"{candidate} is empty")
            return candidate
    raise ConfigError(f"{field} = {path!r}: no such file; looked at {', '.join(str(t.absolute()) for t in tried)}")


def decode_utf8(data: bytes, path: Path | str) -> str:
    """Strict UTF-8 decoding; a byte order mark is left out.

    Raises:
      ConfigError: names the file and the offset of the first byte that is not UTF-8.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} "
                          f"({error.reason})") from None


def check_unicode(text: str, field: str) -> None:
    """ConfigError where a text from a command line or from JSON holds half of a surrogate pair, which no tokenizer takes."""
    lone = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    check(lone is None, field, text[:80].encode("utf-8", "backslashreplace").decode(), "holds what is not valid Unicode")


def hash_documents(splits: Sequence[Sequence[str]]) -> str:
    """SHA-256 over the documents of several splits; borders between documents and splits count."""
    digest = hashlib.sha256()
    for documents in splits:
        digest.update(b"\x00split\x00")
        for document in documents:
            data = document.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()


class LoadedText(abc.ABC):
    """A text corpus that fits in memory; `load` is called once, at first use."""

    content: ClassVar[str] = "text"
    name: str

    @abc.abstractmethod
    def load(self) -> dict[str, list[str]]:
        """Documents by split."""

    @cached_property
    def _splits(self) -> dict[str, list[str]]:
        return self.load()

    def documents(self, split: str) -> Sequence[str]:
        return self._splits[split]

    @cached_property
    def fingerprint(self) -> str:
        return hash_documents([self._splits[split] for split in SPLITS])

    @cached_property
    def size_bytes(self) -> int:
        return sum(len(d.encode("utf-8")) for split in SPLITS for d in self._splits[split])


# Left out: tests and bundled programs (many distributions lack them), tables of code pages, and what is generated per machine.
STDLIB_PACKAGES = ("asyncio", "collections", "concurrent", "ctypes", "email", "html", "http", "importlib", "json", "logging",
                   "multiprocessing", "re", "sqlite3", "tomllib", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zipfile")
STDLIB_LEFT_OUT = ("_sysconfigdata", "__phello__", "sitecustomize")


class StdlibText(LoadedText):
    """Source text of Python's own library and the topics of its documentation; one document per module or topic."""

    name = "stdlib"

    def load(self) -> dict[str, list[str]]:
        splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        seen: set[str] = set()
        for name, text in sorted({**_stdlib_modules(), **_stdlib_topics()}.items()):
            if text not in seen:  # some topics share their text, which must not land in both splits
                splits[stdlib_split(name)].append(text)
            seen.add(text)
        check(all(splits.values()), "data.source", "stdlib", "this Python has no library source; give text:PATH instead")
        return splits


def stdlib_split(name: str) -> str:
    """`evaluation` for about a tenth of the modules, chosen by a hash of the name alone; so the splits share no module."""
    return "evaluation" if hashlib.sha256(name.encode()).digest()[0] < 26 else "train"


def _stdlib_modules() -> dict[str, str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = list(root.glob("*.py"))
    for package in STDLIB_PACKAGES:
        paths += (root / package).rglob("*.py")
    texts = {}
    for path in paths:
        relative = path.relative_to(root)
        if path.name.startswith(STDLIB_LEFT_OUT) or "test" in relative.parts:
            continue
        with tokenize.open(path) as file:
            text = file.read()
        if text.strip():
            texts[relative.as_posix()] = text
    return texts


def _stdlib_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # split off from Python by some distributions
        return {}
    return {f"topics/{name}": text for name, text in topics.items()}


class FileText(LoadedText):
    """One UTF-8 file; the first 90 % of its bytes train, the rest evaluate; no character is cut."""

    def __init__(self, path: Path):
        self.path = path
        self.name = f"text:{path}"

    def load(self) -> dict[str, list[str]]:
        data = self.path.read_bytes()
        decode_utf8(data, self.path)
        cut = len(data) * 9 // 10
        while cut and data[cut] & 0xC0 == 0x80:
            cut -= 1
        check(cut, "data.source", self.name, "too short to be split into training and evaluation text")
        return {"train": [data[:cut].decode()], "evaluation": [data[cut:].decode()]}


@register("source", "stdlib")
@dataclass(frozen=True)
class Stdlib:
    """Python's own documentation and library source: text that every user has. It differs by Python release: quote its hash."""

    content: ClassVar[str] = "text"

    def open(self, directories: Sequence[Path]) -> TextCorpus:
        return StdlibText()


@register("source", "text")
@dataclass(frozen=True)
class Text:
    """A UTF-8 text file, as given or below the data folder."""

    path: str
    content: ClassVar[str] = "text"
    takes_path: ClassVar[bool] = True

    def open(self, directories: Sequence[Path]) -> TextCorpus:
        return FileText(find_file(self.path, directories, "data.source: text"))
