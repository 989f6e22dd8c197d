"""Safetensors: a strict reader of one or many files in a folder or zip archive, and a writer that holds one tensor at a time.

A file is eight bytes (the header's length), the header (JSON: name -> dtype, shape, data_offsets; `__metadata__`), then the
tensors' bytes side by side, row-major and little-endian. What a header claims is checked against the file before it is used.
Sharded models have a `model.safetensors.index.json` whose `weight_map` names each tensor's file.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sparsejax.io.files import Files, FolderFiles, listed, open_files, parse_object, read_object, refuse_unless
from sparsejax.io.tensors import TensorInfo
from sparsejax.plugs import ConfigError, check, check_choice, nearest

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library
MAX_RANK = 32
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


class Place(NamedTuple):
    """A tensor of one file; `start` and `stop` are bytes from the beginning of that file."""

    info: TensorInfo
    start: int
    stop: int


class Header(NamedTuple):
    places: dict[str, Place]
    metadata: dict[str, str]


class Safetensors:
    """The tensors of one file or of all shards, checked and mapped: `read` returns a read-only view of the mapping.

    `metadata` joins the shards' `__metadata__`; where two disagree, the first shard in name order wins.
    """

    def __init__(self, path: Path, files: Files, headers: Mapping[str, Header]):
        self.path = path
        self._files = files
        self._places = {name: (file, place) for file, header in headers.items() for name, place in header.places.items()}
        self._bytes = {file: files.mapped(file).view(np.ndarray) for file in headers}
        self.tensors: dict[str, TensorInfo] = {name: place.info for name, (_, place) in self._places.items()}
        self.metadata: dict[str, str] = {}
        for header in headers.values():
            self.metadata = header.metadata | self.metadata

    def read(self, name: str) -> np.ndarray:
        """The tensor, a read-only view, which may be unaligned in memory.

        Raises:
          ConfigError: no tensor of this name, or a BOOL tensor with bytes other than 0 and 1.
        """
        if name not in self._places:
            raise ConfigError(f"{self.path}: there is no tensor {name!r}.{nearest(name, self.tensors)}")
        file, (info, start, stop) = self._places[name]
        stored = self._bytes[file][start:stop]
        if info.dtype == np.bool_ and stored.size and stored.max() > 1:
            raise ConfigError(f"{self._files.where(file)}: {name}: a BOOL holds the byte {stored.max()}, allowed are 0 and 1")
        return stored.view(info.dtype).reshape(info.shape)


def open_safetensors(path: str | Path) -> Safetensors:
    """Open a `.safetensors` file, or a folder or zip archive that holds one or an index with its shards; nothing is read yet.

    As in Hugging Face's loader, `model.safetensors` is taken where it stands beside an index.

    Raises:
      ConfigError: nothing there, or a file whose header does not describe exactly its bytes; names file and tensor.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        files: Files = FolderFiles(path.parent)
        return Safetensors(path, files, {path.name: read_header(files, path.name)})
    files = open_files(path)
    found = {name for name in files.names if name.endswith(".safetensors")}
    if SINGLE not in found and INDEX in files.names:
        return Safetensors(path, files, _shard_headers(files))
    check(found, "model", str(path), f"holds no safetensors file, but {listed(files.names)}")
    check(SINGLE in found or len(found) == 1, "model", str(path), f"holds {listed(found)} and no {INDEX} that joins them")
    name = SINGLE if SINGLE in found else found.pop()
    return Safetensors(path, files, {name: read_header(files, name)})


def _shard_headers(files: Files) -> dict[str, Header]:
    """Headers by shard, in name order, after comparing each with the index."""
    where = files.where(INDEX)
    weight_map = read_object(files, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{where}: weight_map = {reprlib.repr(weight_map)}: expected tensor names with their files")
    wanted: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        is_plain = isinstance(file, str) and not {"/", "\\"} & set(file)
        refuse_unless(is_plain, f"{where}: {name}", file, "expected a file beside the index")
        wanted.setdefault(file, set()).add(name)
    missing = set(wanted) - files.names
    there = listed(name for name in files.names if name.endswith(".safetensors"))
    check(not missing, where, listed(missing), f"missing beside it; there is {there}")
    headers = {}
    for file in sorted(wanted):
        headers[file] = read_header(files, file)
        absent, extra = wanted[file] - set(headers[file].places), set(headers[file].places) - wanted[file]
        check(not absent, f"{files.where(file)}: tensors", listed(absent), f"missing here, though {INDEX} says so")
        check(not extra, f"{files.where(file)}: tensors", listed(extra), f"not in {INDEX}, or there with another file")
    return headers


def read_header(files: Files, name: str) -> Header:
    """The checked header of one file: what it claims is exactly what the file holds."""
    where, size = files.where(name), files.size(name)
    check(size >= 8, where, f"{size} bytes", "truncated: a safetensors file begins with the eight bytes of its header's length")
    length = int.from_bytes(files.head(name, 8), "little")
    check(2 <= length <= min(MAX_HEADER, size - 8), where, length,
          f"header length beyond the file ({size} bytes) or the format's limit ({MAX_HEADER}): truncated, or not safetensors")
    text = files.head(name, 8 + length)[8:]
    check(len(text) == length, where, len(text), f"truncated inside the header of {length} bytes")
    described = parse_object(text, f"{where}: header")
    metadata = described.pop("__metadata__", {})
    has_strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    refuse_unless(has_strings, f"{where}: __metadata__", metadata, "expected names with strings")
    places = {tensor: _place(entry, 8 + length, f"{where}: {tensor}") for tensor, entry in described.items()}
    _check_cover(places, 8 + length, size, where)
    return Header(places, metadata)


def _place(entry: Any, base: int, where: str) -> Place:
    """A header's entry, whose offsets count from `base`."""
    known = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    refuse_unless(known, where, entry, "expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    check_choice(f"{where}: dtype", dtype if isinstance(dtype, str) else reprlib.repr(dtype), DTYPES)
    refuse_unless(_are_sizes(shape) and len(shape) <= MAX_RANK, f"{where}: shape", shape, f"expected at most {MAX_RANK} sizes")
    in_order = _are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]
    refuse_unless(in_order, f"{where}: data_offsets", offsets, "expected the first byte and the one after the last")
    itemsize = DTYPES[dtype].itemsize
    # numpy multiplies the sizes of an empty tensor too, without its zeros
    addressable = math.prod(size for size in shape if size) * itemsize < 2**63
    refuse_unless(addressable, f"{where}: shape", shape, "more bytes than can be addressed")
    needed, given = math.prod(shape) * itemsize, offsets[1] - offsets[0]
    refuse_unless(needed == given, f"{where}: data_offsets", offsets, f"{given} bytes; {dtype} of shape {shape} takes {needed}")
    return Place(TensorInfo(tuple(shape), DTYPES[dtype]), base + offsets[0], base + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_cover(places: Mapping[str, Place], base: int, size: int, where: str) -> None:
    """The tensors lie side by side and fill the file."""
    end = base
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].stop)):
        check(place.stop <= size, f"{where}: {name}", place.stop - base,
              f"ends after the file, which has {size - base} bytes of data: truncated?")
        check(place.start == end, f"{where}: {name}", place.start - base,
              f"expected to begin at {end - base}, where the tensor before it ends: tensors may not overlap or leave gaps")
        end = place.stop
    check(end == size, where, f"{size - base} bytes", f"the tensors of its header end at byte {end - base} of the data")


class Planned(NamedTuple):
    """A tensor to write; `produce` is called once, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    produce: Callable[[], Any]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """What `write_safetensors` wrote: the files in order, the index last where there is one, and the tensors' bytes."""

    files: tuple[Path, ...]
    size: int


def write_safetensors(
    folder: str | Path,
    tensors: Iterable[tuple[str, tuple[int, ...], Any, Callable[[], Any]]],
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write tensors as `model.safetensors`, or as shards with their index, holding one tensor in memory at a time.

    A file gets its name when it is complete, the index last; after an error the folder holds none of them.

    Args:
      folder: made if need be; must hold no safetensors yet, since a reader could not tell old shards from new ones.
      tensors: name, shape, dtype, and a function that returns that array when it is called.
      max_shard_bytes: a shard takes tensors in the order given until the next would exceed this; a larger one is a shard alone.
      metadata: for `__metadata__`; by default `{"format": "pt"}`, without which transformers refuses a file.
    Raises:
      ConfigError: no tensors, a name twice, a dtype the format has not, an array that is not as announced, a folder in use or a
        disk that is full.
    """
    folder = Path(folder)
    plan = [Planned(name, tuple(shape), np.dtype(dtype), produce) for name, shape, dtype, produce in tensors]
    _check_plan(plan, max_shard_bytes, folder)
    shards = _sharded(plan, max_shard_bytes)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    size = sum(tensor.size for tensor in plan)
    done: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = [entry.name for entry in folder.iterdir() if entry.name == INDEX or entry.name.endswith(".safetensors")]
        check(not used, "folder", str(folder), f"already holds {listed(used)}; give a new one")
        for name, shard in zip(names, shards, strict=True):
            _write_whole(folder / name, _chunks(shard, metadata or {"format": "pt"}), done)
        if len(shards) > 1:
            weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            _write_whole(folder / INDEX, [json.dumps(index, indent=2).encode() + b"\n"], done)
    except BaseException as error:
        for path in done:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConfigError(f"{folder}: cannot be written ({error})") from error
        raise
    return Written(tuple(done), size)


def _check_plan(plan: list[Planned], max_shard_bytes: int, folder: Path) -> None:
    check(plan, "tensors", 0, f"there is nothing to write into {folder}")
    check(max_shard_bytes > 0, "max_shard_bytes", max_shard_bytes, "must be positive")
    seen: set[str] = set()
    for tensor in plan:
        check(tensor.dtype in DTYPES.values(), f"{tensor.name}: dtype", str(tensor.dtype), f"allowed are {', '.join(DTYPES)}")
        check(tensor.name not in seen, "tensor", tensor.name, "is given twice")
        check(tensor.name != "__metadata__", "tensor", tensor.name, "the format keeps this name for itself")
        seen.add(tensor.name)


def _sharded(plan: list[Planned], most: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in plan:
        if shards[-1] and filled + tensor.size > most:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    # wider items first, so that every tensor is aligned in the mapping
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _chunks(shard: list[Planned], metadata: Mapping[str, str]) -> Iterable[Any]:
    """The bytes of a file, one tensor at a time."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.size
        header[tensor.name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in shard:
        array = np.asarray(tensor.produce(), order="C")
        check(array.shape == tensor.shape and array.dtype == tensor.dtype, tensor.name, f"{array.dtype}{list(array.shape)}",
              f"announced as {tensor.dtype}{list(tensor.shape)}")
        yield array.reshape(-1).view(np.uint8)


def _write_whole(path: Path, chunks: Iterable[Any], done: list[Path]) -> None:
    """Write under another name, reach the disk, then take the name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    done.append(path)
