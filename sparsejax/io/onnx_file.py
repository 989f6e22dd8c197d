"""ONNX: the weights of a file, which are its graph's initializers.

The protobuf is read here and not by the `onnx` package: four message types and four wire types are all it takes, the weights
stay mapped (the package copies the whole model into Python objects), and every length is checked against the file first.
Read are initializers stored inside the file, as raw bytes or as packed values; sparse and external ones are refused by name.
What a file's weights are called elsewhere is in `onnx_layouts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sparsejax.io.files import FolderFiles
from sparsejax.io.tensors import TensorInfo
from sparsejax.plugs import ConfigError, check, nearest

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4, groups, are in no version of ONNX
MAX_RANK = 32

# TensorProto.data_type, and the field that holds such values where raw_data (9) does not.
DTYPES: dict[int, tuple[np.dtype, int]] = {
    1: (np.dtype("<f4"), 4),
    2: (np.dtype("u1"), 5),
    3: (np.dtype("i1"), 5),
    4: (np.dtype("<u2"), 5),
    5: (np.dtype("<i2"), 5),
    6: (np.dtype("<i4"), 5),
    7: (np.dtype("<i8"), 7),
    9: (np.dtype("?"), 5),
    10: (np.dtype("<f2"), 5),
    11: (np.dtype("<f8"), 10),
    12: (np.dtype("<u4"), 11),
    13: (np.dtype("<u8"), 11),
    16: (np.dtype(ml_dtypes.bfloat16), 5),
    17: (np.dtype(ml_dtypes.float8_e4m3fn), 5),
    19: (np.dtype(ml_dtypes.float8_e5m2), 5),
}
RAW, FLOATS, DOUBLES = 9, 4, 10
VALUE_FIELDS = {RAW, *(field for _, field in DTYPES.values())}


class Stored(NamedTuple):
    """A TensorProto: its values as `field` of the message holds them."""

    info: TensorInfo
    field: int
    data: memoryview


class Node(NamedTuple):
    """An operation of the graph; `value` is the TensorProto of a Constant, for `constant` to read."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    value: memoryview | None


class OnnxFile:
    """The initializers of an ONNX file and the graph they stand in; mapped, checked when it is opened.

    Raises:
      ConfigError: no ONNX file, a truncated one, or a tensor that claims other values than it holds; names file and tensor.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files = FolderFiles(self.path.parent)
        check(self.path.name in files.names, "file", str(path), "there is no such file")
        check(files.size(self.path.name) > 0, "file", str(path), "is empty")
        model = fields(memoryview(files.mapped(self.path.name)), f"{path}: not an ONNX file, or damaged")
        graphs = [value for number, kind, value in model if number == 7 and kind == BYTES]
        check(len(graphs) == 1, "file", str(path), f"not an ONNX file: holds {len(graphs)} graphs, expected one")
        self.nodes: list[Node] = []
        self._stored: dict[str, Stored] = {}
        self._read_graph(graphs[0])
        self.tensors: dict[str, TensorInfo] = {name: stored.info for name, stored in self._stored.items()}

    def read(self, name: str) -> np.ndarray:
        """The initializer, a read-only view; packed integers are decoded.

        Raises:
          ConfigError: no initializer of this name.
        """
        if name not in self._stored:
            raise ConfigError(f"{self.path}: there is no tensor {name!r}.{nearest(name, self.tensors)}")
        return decode(self._stored[name])

    def constant(self, node: Node) -> np.ndarray | None:
        """What a Constant node gives, where that is a tensor.

        Raises:
          ConfigError: a tensor that claims other values than it holds.
        """
        return None if node.value is None else decode(_tensor(node.value, f"{self.path}: {node.outputs[:1]}")[1])

    def _read_graph(self, graph: memoryview) -> None:
        where = f"{self.path}: graph"
        for number, kind, value in fields(graph, where):
            if number == 1 and kind == BYTES:
                self.nodes.append(_node(value, where))
            elif number == 5 and kind == BYTES:
                name, stored = _tensor(value, where)
                check(name and name not in self._stored, f"{where}: initializer", name, "has no name, or another's")
                self._stored[name] = stored
            elif number == 15:
                raise ConfigError(f"{where}: holds sparse initializers, which are not read")


def fields(message: memoryview, where: str) -> Iterator[tuple[int, int, Any]]:
    """(field number, wire type, int or bytes) of a protobuf message, lazily.

    Raises:
      ConfigError: a field that does not end inside the message, or has a wire type that ONNX does not use.
    """
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position, where)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, position = _varint(message, position, where)
            yield number, kind, value
            continue
        if kind == BYTES:
            length, position = _varint(message, position, where)
        elif kind in (FIXED32, FIXED64):
            length = 4 if kind == FIXED32 else 8
        else:
            raise ConfigError(f"{where}: byte {position} of the message begins a field of wire type {kind}")
        if length > end - position:
            raise ConfigError(f"{where}: field {number} claims {length} bytes where {end - position} are left: truncated?")
        yield number, kind, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int, where: str) -> tuple[int, int]:
    """An unsigned number of seven bits per byte, at most 64, and where it ends."""
    value = shift = 0
    for byte in message[position : position + 10]:
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value & (2**64 - 1), position
    raise ConfigError(f"{where}: a number at byte {position} of the message does not end: truncated?")


def _text(value: Any, kind: int, where: str) -> str:
    if kind != BYTES:
        raise ConfigError(f"{where}: a name is stored as a number")
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: a name is not UTF-8 ({error.reason})") from error


def _node(message: memoryview, where: str) -> Node:
    inputs, outputs, op, value = [], [], "", None
    for number, kind, content in fields(message, where):
        if number == 1:
            inputs.append(_text(content, kind, where))
        elif number == 2:
            outputs.append(_text(content, kind, where))
        elif number == 4:
            op = _text(content, kind, where)
        elif number == 5 and kind == BYTES:
            value = next((inner for field, wire, inner in fields(content, where) if field == 5 and wire == BYTES), value)
    return Node(op, tuple(inputs), tuple(outputs), value)


def _tensor(message: memoryview, where: str) -> tuple[str, Stored]:
    """Name and checked content of a TensorProto."""
    shape: list[int] = []
    code, name, external = 0, "", False
    held: dict[int, memoryview] = {}
    for number, kind, value in fields(message, where):
        if number == 1:
            shape += [value] if kind == VARINT else _varints(value, where)
        elif number == 2 and kind == VARINT:
            code = value
        elif number == 8:
            name = _text(value, kind, where)
        elif number in VALUE_FIELDS:
            packed = kind == BYTES and number not in held
            check(packed, f"{where}: {name}: field", number, "holds its values one by one; expected them packed")
            held[number] = value
        external = external or number == 13 or (number == 14 and value == 1)
    where = f"{where}: {name}"
    check(not external, where, "external", "its values lie in another file; save the model with its weights inside")
    if code not in DTYPES:
        allowed = ", ".join(f"{number} ({dtype})" for number, (dtype, _) in DTYPES.items())
        raise ConfigError(f"{where}: data type {code}; read are {allowed}")
    return name, _checked(tuple(shape), code, held, where)


def _varints(packed: memoryview, where: str) -> list[int]:
    values, position = [], 0
    while position < len(packed):
        value, position = _varint(packed, position, where)
        values.append(value)
    return values


def _checked(shape: tuple[int, ...], code: int, held: Mapping[int, memoryview], where: str) -> Stored:
    """The one field that holds the values, after comparing their number with the shape."""
    dtype, own = DTYPES[code]
    check(len(shape) <= MAX_RANK and all(size < 2**63 for size in shape), f"{where}: shape", shape[:MAX_RANK], "expected sizes")
    addressable = math.prod(size for size in shape if size) * dtype.itemsize < 2**63
    check(addressable, f"{where}: shape", shape, "more bytes than can be addressed")
    used = {field: data for field, data in held.items() if len(data)}
    check(set(used) <= {RAW} or set(used) == {own}, f"{where}: fields", sorted(used), f"expected {RAW} or {own} alone")
    field, data = next(iter(used.items()), (RAW, memoryview(b"")))
    count = math.prod(shape)
    if field in (RAW, FLOATS, DOUBLES):
        held_count: float = len(data) / dtype.itemsize
    else:  # every number ends with the one byte of it that is below 0x80
        held_count = int(np.count_nonzero(np.frombuffer(data, np.uint8) < 0x80))
    check(held_count == count, f"{where}: shape", shape, f"{count} values of {dtype}, but {held_count:g} are there")
    return Stored(TensorInfo(shape, dtype), field, data)


def decode(stored: Stored) -> np.ndarray:
    """The array of a tensor; packed integers are copied, all else is a view."""
    shape, dtype = stored.info
    if stored.field in (RAW, FLOATS, DOUBLES):
        return np.frombuffer(stored.data, dtype).reshape(shape)
    numbers = np.array(_varints(stored.data, "tensor"), np.uint64)
    if dtype.kind in "iub":
        return numbers.astype(dtype).reshape(shape)
    bits = np.dtype(f"u{dtype.itemsize}")  # half-precision floats are stored as the numbers their bits stand for
    return numbers.astype(bits).view(dtype).reshape(shape)
