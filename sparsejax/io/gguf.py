"""GGUF version 3, the single-file format of llama.cpp: a header, key-value metadata, tensor descriptions, tensor data.

Everything that a file says about itself is checked against the bytes that are there before anything is allocated, in time
proportional to the file; tensors stay on disk until they are read. Format: ggml/docs/gguf.md of the ggml repository.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejax.io.ggml_blocks import BLOCK_TYPES, BY_NAME, OTHER_TYPES, BlockType, decode
from sparsejax.io.tensors import TensorInfo
from sparsejax.plugs import ConfigError, nearest

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4  # ggml's own limit
MAX_NESTING = 4  # of arrays; published files have none that are nested
SMALLEST_PAIR = 8 + 4 + 1  # bytes of a key's length, a value's type and the value
SMALLEST_TENSOR = 8 + 4 + 4 + 8  # bytes of a name's length, a number of dimensions, a type and an offset

_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class Location(NamedTuple):
    """Where a tensor lies: its block type and the first and past-the-last byte in the file."""

    block: BlockType
    start: int
    stop: int


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file, checked as a whole; a `TensorSource` of the names and the row-major shapes that the file gives.

    `metadata` holds str, int, float, bool, lists of str or of lists, and numpy arrays for arrays of numbers; a float32 is the
    shortest decimal that rounds to it. `read` returns float32 for quantized tensors, and a memory-mapped view of the others.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    locations: Mapping[str, Location]
    data: np.ndarray  # uint8, the mapped file

    @property
    def block_types(self) -> dict[str, str]:
        """The name of each tensor's block type."""
        return {name: location.block.name for name, location in self.locations.items()}

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """Block type and bytes uint8[N] of a tensor, mapped and not decoded."""
        location = self._location(name)
        return location.block.name, self.data[location.start : location.stop]

    def read(self, name: str) -> np.ndarray:
        block, data = self.raw(name)
        return decode(block, data).reshape(self.tensors[name].shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """`read(name)[start:stop]`, decoding no more than that: what copies a large table through a small buffer."""
        block, data = self.raw(name)
        rows, *rest = self.tensors[name].shape
        if not rest and BY_NAME[block].elements > 1:  # blocks run along the only axis
            return self.read(name)[start:stop]
        start, stop, _ = slice(start, stop).indices(rows)
        size = len(data) // rows
        return decode(block, data[start * size : max(start, stop) * size]).reshape(-1, *rest)

    def _location(self, name: str) -> Location:
        if name not in self.locations:
            raise ConfigError(f"{self.path}: there is no tensor {name!r}.{nearest(name, self.locations)}")
        return self.locations[name]


def open_gguf(path: str | Path) -> GgufFile:
    """Read and check everything but the tensors' numbers.

    Raises:
      ConfigError: no such file, not GGUF version 3, or anything in it that does not hold together; names the key or tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise ConfigError(f"{path}: the file is empty")
    data = np.memmap(path, np.uint8, mode="r")
    cursor = _Cursor(path, data)
    num_tensors, num_pairs = _read_header(cursor)
    metadata = _read_metadata(cursor, num_pairs)
    described = _read_descriptions(cursor, num_tensors)
    alignment = _alignment(path, metadata)
    data_start = -(-cursor.position // alignment) * alignment
    locations = {name: _locate(cursor, name, one, data_start, alignment) for name, one in described.items()}
    _check_overlaps(path, locations)
    tensors = {name: TensorInfo(one.shape, locations[name].block.dtype) for name, one in described.items()}
    return GgufFile(path, metadata, tensors, locations, data)


class _Described(NamedTuple):
    shape: tuple[int, ...]
    block: BlockType
    offset: int


class _Cursor:
    """Reads forward through the file; `subject` is what an error names."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.position, self.subject = path, 0, "header"
        self.buffer = memoryview(data)
        self.size = len(data)

    @property
    def remaining(self) -> int:
        return self.size - self.position

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self.path}: {self.subject}: {message}")

    def require(self, count: int) -> None:
        if count > self.remaining:
            raise self.error(f"needs {count} bytes at byte {self.position}, but {self.remaining} are left in the file")

    def take(self, count: int) -> memoryview:
        self.require(count)
        self.position += count
        return self.buffer[self.position - count : self.position]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def count(self, what: str, smallest: int) -> int:
        """A u64 number of things of at least `smallest` bytes each, which must fit into the rest of the file."""
        number = self.u64()
        if number * smallest > self.remaining:
            raise self.error(f"claims {number} {what}, more than the {self.remaining} bytes left in the file can hold")
        return number

    def string(self) -> str:
        encoded = bytes(self.take(self.count("bytes of text", 1)))
        try:
            return encoded.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{encoded[:40]!r} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _read_header(cursor: _Cursor) -> tuple[int, int]:
    """Numbers of tensors and of key-value pairs."""
    magic = bytes(cursor.buffer[:4])
    if magic != MAGIC:
        raise cursor.error(f"the file begins with {magic!r}, a GGUF file with {MAGIC!r}")
    cursor.take(4)
    version = cursor.u32()
    if version == int.from_bytes(VERSION.to_bytes(4, "big"), "little"):
        raise cursor.error("the file is big-endian; little-endian is what is read here")
    if version != VERSION:
        raise cursor.error(f"GGUF version {version}; version {VERSION} is what is read here")
    return cursor.count("tensors", SMALLEST_TENSOR), cursor.count("metadata pairs", SMALLEST_PAIR)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        cursor.subject = f"metadata pair {index}"
        key = cursor.string()
        cursor.subject = f"metadata {key!r}"
        if key in metadata:
            raise cursor.error("the key is there twice")
        metadata[key] = _value(cursor, cursor.u32(), 0)
    return metadata


def _value(cursor: _Cursor, kind: int, depth: int) -> Any:
    if kind in _NUMBERS:
        dtype = np.dtype(_NUMBERS[kind])
        (number,) = np.frombuffer(cursor.take(dtype.itemsize), dtype)
        return float(str(number)) if kind == 6 else number.item()
    if kind == _BOOL:
        return _bools(cursor, 1)[0].item()
    if kind == _STRING:
        return cursor.string()
    if kind == _ARRAY:
        return _array(cursor, depth)
    raise cursor.error(f"value type {kind}: known are 0 to {max(_NUMBERS)}")


def _bools(cursor: _Cursor, count: int) -> np.ndarray:
    stored = np.frombuffer(cursor.take(count), np.uint8)
    if stored.max(initial=0) > 1:
        raise cursor.error(f"a bool is stored as {stored.max()}: 0 and 1 are allowed")
    return stored.astype(bool)


def _array(cursor: _Cursor, depth: int) -> Any:
    if depth == MAX_NESTING:
        raise cursor.error(f"arrays are nested more than {MAX_NESTING} deep")
    kind = cursor.u32()
    if kind in _NUMBERS:
        dtype = np.dtype(_NUMBERS[kind])
        count = cursor.count("numbers", dtype.itemsize)
        return np.frombuffer(bytes(cursor.take(count * dtype.itemsize)), dtype)
    if kind == _BOOL:
        return _bools(cursor, cursor.count("bools", 1))
    if kind == _STRING:
        return _strings(cursor, cursor.count("strings", 8))
    if kind == _ARRAY:
        return [_array(cursor, depth + 1) for _ in range(cursor.count("arrays", 12))]
    raise cursor.error(f"an array of value type {kind}: known are 0 to {max(_NUMBERS)}")


def _strings(cursor: _Cursor, count: int) -> list[str]:
    """Vocabularies are arrays of up to half a million strings, so this is `cursor.string` without its calls."""
    buffer, position, size, found = cursor.buffer, cursor.position, cursor.size, []
    length_at = struct.Struct("<Q").unpack_from
    subject = cursor.subject
    try:
        for _ in range(count):
            stop = position + 8 + length_at(buffer, position)[0]
            if stop > size:
                break
            found.append(str(buffer[position + 8 : stop], "utf-8"))
            position = stop
    except (struct.error, UnicodeDecodeError):
        pass
    cursor.position = position
    while len(found) < count:  # the element that did not fit, again: to say why
        cursor.subject = f"{subject}[{len(found)}]"
        found.append(cursor.string())
    cursor.subject = subject
    return found


def _read_descriptions(cursor: _Cursor, count: int) -> dict[str, _Described]:
    described: dict[str, _Described] = {}
    for index in range(count):
        cursor.subject = f"tensor {index}"
        name = cursor.string()
        cursor.subject = f"tensor {name!r}"
        if name in described:
            raise cursor.error("the name is there twice")
        rank = cursor.u32()
        if not 1 <= rank <= MAX_DIMENSIONS:
            raise cursor.error(f"claims {rank} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
        dimensions = [cursor.u64() for _ in range(rank)]  # fastest first
        if 0 in dimensions:
            raise cursor.error(f"dimensions {dimensions}: none may be 0")
        described[name] = _Described(tuple(reversed(dimensions)), _block_type(cursor, cursor.u32()), cursor.u64())
    return described


def _block_type(cursor: _Cursor, number: int) -> BlockType:
    if number not in BLOCK_TYPES:
        name = OTHER_TYPES.get(number, "unknown")
        raise cursor.error(f"block type {number} ({name}) is not supported; supported are {', '.join(BY_NAME)}")
    return BLOCK_TYPES[number]


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ConfigError(f"{path}: metadata 'general.alignment' = {alignment!r}: must be a power of two, 8 or more")
    return alignment


def _locate(cursor: _Cursor, name: str, one: _Described, data_start: int, alignment: int) -> Location:
    """Where a tensor lies, once its size and offset have been found possible."""
    cursor.subject = f"tensor {name!r}"
    row, elements = (one.shape or (1,))[-1], math.prod(one.shape)
    if row % one.block.elements:
        raise cursor.error(f"shape {one.shape}: rows of {row} are not whole {one.block.name} blocks of {one.block.elements}")
    if one.offset % alignment:
        raise cursor.error(f"its offset {one.offset} is not a multiple of the alignment {alignment}")
    size = elements // one.block.elements * one.block.size
    start = data_start + one.offset
    if start + size > cursor.size:
        raise cursor.error(f"shape {one.shape} in {one.block.name} is {size} bytes at {start}, past the file's {cursor.size}")
    return Location(one.block, start, start + size)


def _check_overlaps(path: Path, locations: Mapping[str, Location]) -> None:
    end, before = 0, ""
    for name, location in sorted(locations.items(), key=lambda item: item[1].start):
        if location.start < end:
            raise ConfigError(f"{path}: tensor {name!r} begins at byte {location.start}, inside {before!r} that ends at {end}")
        end, before = location.stop, name
