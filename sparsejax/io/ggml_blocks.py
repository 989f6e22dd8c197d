"""Decoders of the ggml block types that GGUF files hold, bit for bit as ggml's own C code decodes them.

A quantized tensor is a row-major sequence of blocks, each with its own scales. Numbers are formed as `(d * s) * q - (dmin * m)`
in float32 with every operation rounded by itself (no fused multiply-add), which is what makes the result reproducible.
Layouts: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from sparsejax.ops.formats.tables import FP4_E2M1

CHUNK = 2**17  # elements decoded at a time: the temporaries stay in cache and below 2 MB, whatever the tensor's size


class BlockType(NamedTuple):
    """Elements and bytes of one block; `plain` where the bytes already are numbers of that dtype."""

    name: str
    elements: int
    size: int
    plain: np.dtype | None = None

    @property
    def dtype(self) -> np.dtype:
        """What a tensor of this type becomes when it is read."""
        return np.dtype(np.float32) if self.plain is None else self.plain


BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, np.dtype("<f4")),
    1: BlockType("F16", 1, 2, np.dtype("<f2")),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
    39: BlockType("MXFP4", 32, 17),
}
BY_NAME = {block.name: block for block in BLOCK_TYPES.values()}

# Types that exist and that nothing here decodes, so that a refusal can say what a file holds.
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
    41: "Q1_0",
}


def decode(name: str, data: np.ndarray) -> np.ndarray:
    """The numbers of a run of blocks.

    Args:
      name: block type, e.g. `"Q4_K"`.
      data: uint8[N * size], whole blocks.
    Returns:
      float32[N * elements]; of the plain types F32, F16 and BF16 a view of `data` in their own dtype. Scales that are infinite
      or NaN give infinities and NaNs, as in ggml.
    """
    block = BY_NAME[name]
    if block.plain is not None:
        return data.view(block.plain)
    blocks = data.reshape(-1, block.size)
    rows = np.empty((len(blocks), block.elements), np.float32)
    step = CHUNK // block.elements
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            _DECODERS[name](blocks[start : start + step], rows[start : start + step])
    return rows.reshape(-1)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at a byte offset of every block, as float32[N, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8[..., P] to uint8[..., 2, P]: the low nibbles, then the high ones."""
    out = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=out[..., 0, :])
    np.right_shift(packed, 4, out=out[..., 1, :])
    return out


def _fifth_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """uint8[N, 32] of 0 or 16: bit e of the 32-bit word belongs to element e."""
    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << 4


def _two_bits(packed: np.ndarray) -> np.ndarray:
    """uint8[N, P] to uint8[N, 4, P]: the bit pairs, lowest first."""
    return (packed[:, None, :] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = _nibbles(blocks[:, 2:]).reshape(-1, 32).view(np.int8) - np.int8(8)
    np.multiply(codes, _half(blocks, 0), out=out)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_nibbles(blocks[:, 4:]).reshape(-1, 32), _half(blocks, 0), out=out)
    out += _half(blocks, 2)


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = _nibbles(blocks[:, 6:]).reshape(-1, 32) | _fifth_bits(blocks, 2)
    np.multiply(codes.view(np.int8) - np.int8(16), _half(blocks, 0), out=out)


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    codes = _nibbles(blocks[:, 8:]).reshape(-1, 32) | _fifth_bits(blocks, 4)
    np.multiply(codes, _half(blocks, 0), out=out)
    out += _half(blocks, 2)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out)


def _mxfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    """E2M1 with a shared power of two. ggml keeps doubled values and half the scale; its exponent byte 255 is no NaN."""
    scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    np.multiply(_DOUBLED_E2M1[_nibbles(blocks[:, 1:]).reshape(-1, 32)], scale, out=out)


_DOUBLED_E2M1 = (2 * FP4_E2M1).astype(np.int8)


def _q2_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """Sixteen sub-blocks of 16 with a 4-bit scale (low nibble) and a 4-bit minimum."""
    codes = _two_bits(blocks[:, 16:80].reshape(-1, 32)).reshape(-1, 16, 16)
    scales = _half(blocks, 80) * (blocks[:, :16] & 15)
    minima = _half(blocks, 82) * (blocks[:, :16] >> 4)
    _scaled(codes, scales, minima, out)


def _q3_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """Sixteen sub-blocks of 16 with a signed 6-bit scale; the third bit of a code is stored apart.

    Bit b of byte l belongs to element 32 b + l, and where it is clear 4 is subtracted.
    """
    packed = blocks[:, 96:108]
    low = _nibbles(packed[:, :8]).reshape(-1, 16)
    scales = (low | _two_bits(packed[:, 8:]).reshape(-1, 16) << 4).view(np.int8) - np.int8(32)
    third = np.unpackbits(blocks[:, None, :32], axis=1, bitorder="little").reshape(-1, 16, 16)
    codes = _two_bits(blocks[:, 32:96].reshape(-1, 32)).reshape(-1, 16, 16) | third << 2
    _scaled(codes.view(np.int8) - np.int8(4), _half(blocks, 108) * scales, None, out)


def _six_bit_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of 6 bits, from 12 bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=1)
    return scales, minima


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """Eight sub-blocks of 32 with a 6-bit scale and a 6-bit minimum."""
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:].reshape(-1, 32)).reshape(-1, 8, 32)
    _scaled(codes, _half(blocks, 0) * scales, _half(blocks, 2) * minima, out)


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """Q4_K with a fifth bit: bit b of byte l belongs to element 32 b + l."""
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    fifth = np.unpackbits(blocks[:, None, 16:48], axis=1, bitorder="little")
    codes = _nibbles(blocks[:, 48:].reshape(-1, 32)).reshape(-1, 8, 32) | fifth << 4
    _scaled(codes, _half(blocks, 0) * scales, _half(blocks, 2) * minima, out)


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """Sixteen sub-blocks of 16 with a signed 8-bit scale; four low bits and two high bits of a code are stored apart."""
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 16, 16)
    high = _two_bits(blocks[:, 128:192].reshape(-1, 32)).reshape(-1, 16, 16)
    scales = blocks[:, 192:208].view(np.int8) * _half(blocks, 208)
    _scaled((low | high << 4).view(np.int8) - np.int8(32), scales, None, out)


def _scaled(codes: np.ndarray, scales: np.ndarray, minima: np.ndarray | None, out: np.ndarray) -> None:
    """`out[n, s * P + p] = scales[n, s] * codes[n, s, p] - minima[n, s]`; no subtraction where there are no minima."""
    view = out.reshape(codes.shape)
    np.multiply(codes, scales[:, :, None], out=view)
    if minima is not None:
        view -= minima[:, :, None]


_DECODERS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "MXFP4": _mxfp4,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}
