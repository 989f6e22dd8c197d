"""A writer of GGUF files, for the tests of their reader."""

import struct

import numpy as np
import pytest

NUMBER_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
BOOL, STRING, ARRAY = 7, 8, 9
GUESSED = {bool: BOOL, int: 4, float: 6, str: STRING}


def encode_string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def encode_value(value):
    """Type number and bytes; `(type, value)` forces a type, and in an array that of its elements."""
    forced = None
    if isinstance(value, tuple):
        forced, value = value
    if isinstance(value, list | np.ndarray):
        kind = GUESSED.get(type(value[0]), ARRAY) if forced is None else forced
        items = [encode_value((kind, one))[1] if kind != ARRAY else encode_value(one)[1] for one in value]
        return ARRAY, struct.pack("<IQ", kind, len(value)) + b"".join(items)
    kind = GUESSED[type(value)] if forced is None else forced
    if kind == STRING:
        return kind, encode_string(value)
    return kind, struct.pack("<?" if kind == BOOL else NUMBER_FORMATS[kind], value)


def encode_gguf(metadata, tensors, *, alignment=32, version=3, counts=None, trailer=b""):
    """A GGUF file.

    metadata: dict, or a list of pairs where a key repeats.
    tensors: name -> (row-major shape, type number, bytes), or an array, stored as F32; or a list of pairs.
    counts: numbers of tensors and of pairs that the header claims.
    """
    pairs = list(metadata.items()) if isinstance(metadata, dict) else metadata
    tensors = list(tensors.items()) if isinstance(tensors, dict) else tensors
    head, body = b"", b""
    for key, value in pairs:
        kind, data = encode_value(value)
        head += encode_string(key) + struct.pack("<I", kind) + data
    for name, tensor in tensors:
        if isinstance(tensor, np.ndarray):
            tensor = (tensor.shape, 0, tensor.astype("<f4").tobytes())
        shape, kind, data = tensor
        head += encode_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(body))
        body += data + bytes(-len(data) % alignment)
    start = struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(pairs)))) + head
    return start + bytes(-len(start) % alignment) + body + trailer


@pytest.fixture(scope="session")
def gguf_bytes():
    return encode_gguf


@pytest.fixture(scope="session")
def open_bytes(tmp_path_factory):
    """Opens bytes as a GGUF file, one file for all."""
    from sparsejax.io.gguf import open_gguf

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"

    def opened(data):
        path.unlink(missing_ok=True)  # an earlier one may still be mapped
        path.write_bytes(data)
        return open_gguf(path)

    return opened


@pytest.fixture(scope="session")
def smollm2():
    """The published SmolLM2-135M-Instruct in Q4_1, where its package is installed."""
    from sparsejax.io import hub
    from sparsejax.io.gguf import open_gguf
    from sparsejax.plugs import ConfigError

    try:
        return open_gguf(hub.resolve("smollm2-135m").path)
    except ConfigError as error:
        pytest.skip(str(error))
