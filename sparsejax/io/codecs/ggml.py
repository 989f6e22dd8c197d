"""The ggml block types that a QTensor holds as they are: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4, both ways.

A row of 32 inputs of one output is a block: its scale (and minimum) as float16, then, of 5 bits, a word of the fifth bits, then
the codes; byte j has code j low and code j + 16 high. `io.ggml_blocks` decodes the same bytes, and the K types, into floats.
Its quantizers are those formats of `ops.formats.spec`; any format of the same shape is written too, in its own codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsejax.io.codecs.host import held, spread_out
from sparsejax.io.ggml_blocks import BY_NAME
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, check_choice
from sparsejax.quantized_arrays import QTensor

NAMES = {"Q4_0": "q4_0", "Q4_1": "q4_1", "Q5_0": "q5_0", "Q5_1": "q5_1", "Q8_0": "q8_0", "MXFP4": "mxfp4"}
SPECS = {name: FormatSpec.parse(text) for name, text in NAMES.items()}
SIZE = 32


def block_type(spec: FormatSpec, field: str) -> str:
    """The block type that holds kernels of a format.

    Raises:
      ConfigError: none; names the option that differs from the nearest type.
    """
    for name, known in SPECS.items():
        zeros = (spec.symmetric == "asym") == (known.symmetric == "asym")
        if spec.element == known.element and zeros:
            check(spec.granularity == "group" and spec.size == (SIZE,), f"{field}: format", str(spec), f"{name} has group=32")
            check(spec.axis == -2, f"{field}: axis of {spec}", spec.axis, "allowed is -2: groups lie along the inputs")
            check_choice(f"{field}: scale of {spec}, to be {name}", spec.scale, (known.scale,))
            check_choice(f"{field}: zero of {spec}, to be {name}", spec.zero, (known.zero,))
            return name
    check_choice(f"{field}: format", str(spec), tuple(NAMES.values()))
    raise AssertionError(spec)  # every name of a known type is found above


def encode(field: str, tensor: QTensor) -> tuple[str, np.ndarray]:
    """(block type, uint8[out, bytes of a row]) of a kernel [in, out].

    Raises:
      ConfigError: a format that no block type holds, or inputs that fill no whole blocks.
    """
    name = block_type(tensor.spec, field)
    rows, columns = tensor.shape
    check(rows % SIZE == 0, f"{field}: inputs", rows, f"allowed are multiples of {SIZE}: {name} has whole blocks")
    bits = tensor.spec.bits
    codes = spread_out(tensor)[0][:rows].T.reshape(columns, -1, SIZE)
    parts = [_bytes_of(tensor.scale)]
    if tensor.zero is not None:
        parts.append(_bytes_of(tensor.zero))
    if bits == 8:
        parts.append(codes.view(np.uint8))
    else:
        # Symmetric types store codes from 0: two's complement plus half the range.
        unsigned = (codes + np.int16(2 ** (bits - 1))).astype(np.uint8) if codes.dtype == np.int8 else codes
        if bits == 5:
            parts.append(np.packbits(unsigned >> 4, axis=-1, bitorder="little"))
        parts.append((unsigned[..., :16] & 15) | (unsigned[..., 16:] & 15) << 4)
    return name, np.concatenate(parts, axis=-1).reshape(columns, -1)


def decode(field: str, name: str, data: np.ndarray, inputs: int, dtype: Any) -> QTensor:
    """The kernel [in, out] of a tensor of blocks, in the codes and scales that are stored.

    Args:
      field: the tensor, for messages.
      name: block type.
      data: uint8, row after row, blocks as they are in a file.
      inputs: numbers of a row.
      dtype: of the weight.
    Raises:
      ConfigError: another type, or bytes that make no rows of this length.
    """
    check_choice(f"{field}: type", name, NAMES)
    spec, size = SPECS[name], BY_NAME[name].size
    row = inputs // SIZE * size
    whole = inputs % SIZE == 0 and row > 0 and data.size % row == 0
    check(whole, f"{field}: bytes", data.size, f"no rows of {inputs} numbers of {name}")
    blocks = np.ascontiguousarray(data).reshape(-1, inputs // SIZE, size)
    start = 1 if spec.scale == "e8m0" else 2
    scale = blocks[..., 0] if start == 1 else _halves(blocks[..., :2])
    zero = None
    if spec.zero == "min":
        zero, start = _halves(blocks[..., 2:4]), 4
    if spec.bits == 8:
        codes = blocks[..., start:].view(np.int8)
    else:
        pairs = blocks[..., start + (4 if spec.bits == 5 else 0) :]
        codes = np.concatenate([pairs & 15, pairs >> 4], axis=-1)
        if spec.bits == 5:
            codes |= np.unpackbits(blocks[..., start : start + 4], axis=-1, bitorder="little") << 4
        if spec.grid.signed:
            codes = codes.view(np.int8) - np.int8(2 ** (spec.bits - 1))
    codes = codes.reshape(len(blocks), inputs).T
    return held(codes, scale.T, spec, dtype, zero=None if zero is None else zero.T)


def _bytes_of(groups: Any) -> np.ndarray:
    """uint8[out, groups, bytes] of numbers [groups, out]."""
    array = np.ascontiguousarray(np.asarray(groups).T)
    return array[..., None].view(np.uint8)


def _halves(pairs: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pairs).view("<f2")[..., 0]
