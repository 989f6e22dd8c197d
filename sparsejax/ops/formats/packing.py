"""Codes of fewer than eight bits, packed at their true width along the last axis.

A kernel is [in, out] and a loop over active input channels reads rows of it, so a row's codes lie side by side in whole bytes
of their own: packing along `in` would put several channels into each byte, of which one may be wanted.
b-bit codes form a dense little-endian bitstream: code j takes the bits b j to b j + b - 1 of its row, lowest first. At 4 bits
this is the low nibble first; as 32-bit words it is what GPTQ, compressed-tensors and QuaRot store along their own axes.
Ternary digits go five to a byte in base 3 (3^5 = 243), the first the least: 1.6 bits each.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped, UInt8

TRITS = 5  # to a byte


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes side by side."""
    return -(-count * bits // 8)


def pack_bits(codes: Int[Array, "*lead count"], bits: int) -> UInt8[Array, "*lead packed"]:
    """The bitstream of codes (the low `bits` of each) of 1 to 7 bits; the last byte is filled with zeros."""
    count = codes.shape[-1]
    lanes = _lanes(bits)
    codes = codes.astype(jnp.uint8) & jnp.uint8(2**bits - 1)
    codes = _padded(codes, lanes).reshape(*codes.shape[:-1], -1, lanes)
    packed = []
    for byte in range(lanes * bits // 8):
        parts = []
        for lane in range(lanes):
            shift = bits * lane - 8 * byte
            if -bits < shift < 8:
                code = codes[..., lane]
                parts.append(code << shift if shift >= 0 else code >> -shift)
        total = parts[0]
        for part in parts[1:]:
            total = total | part
        packed.append(total)
    return jnp.stack(packed, axis=-1).reshape(*codes.shape[:-2], -1)[..., : packed_size(count, bits)]


def unpack_bits(packed: UInt8[Array, "*lead packed"], bits: int, count: int, signed: bool) -> Int[Array, "*lead count"]:
    """The inverse of `pack_bits`: uint8 codes, or int8 ones in two's complement where `signed`."""
    return in_order(bit_lanes(packed, bits, signed), count)


def bit_lanes(packed: UInt8[Array, "*lead packed"], bits: int, signed: bool) -> list[Array]:
    """The codes by their places in the bytes that they fill: code j is entry j // lanes [..., n] of lane j % lanes."""
    lanes = _lanes(bits)
    width = lanes * bits // 8
    groups = _padded(packed, width).reshape(*packed.shape[:-1], -1, width)
    codes = []
    for lane in range(lanes):
        byte, shift = divmod(bits * lane, 8)
        code = groups[..., byte] >> shift
        if shift + bits > 8:
            code = code | groups[..., byte + 1] << (8 - shift)
        codes.append(code)
    if signed:
        return [(code << (8 - bits)).view(jnp.int8) >> (8 - bits) for code in codes]
    return [code & jnp.uint8(2**bits - 1) for code in codes]


def in_order(lanes: Sequence[Shaped[Array, "*lead n"]], count: int) -> Shaped[Array, "*lead count"]:
    """Lanes of `bit_lanes` or `trit_lanes` as they follow each other."""
    return jnp.stack(lanes, axis=-1).reshape(*lanes[0].shape[:-1], -1)[..., :count]


def pack_trits(codes: Int[Array, "*lead count"]) -> UInt8[Array, "*lead packed"]:
    """Codes -1, 0 and 1, five to a byte; the last byte is filled with zeros."""
    digits = _padded(codes.astype(jnp.int8), TRITS).reshape(*codes.shape[:-1], -1, TRITS) + jnp.int8(1)
    total = digits[..., TRITS - 1].astype(jnp.uint8)
    for digit in reversed(range(TRITS - 1)):
        total = total * jnp.uint8(3) + digits[..., digit].astype(jnp.uint8)
    return total


def unpack_trits(packed: UInt8[Array, "*lead packed"], count: int) -> Int[Array, "*lead count"]:
    """The inverse of `pack_trits`, as int8."""
    return in_order(trit_lanes(packed), count)


def trit_lanes(packed: UInt8[Array, "*lead packed"]) -> list[Array]:
    """The digits by their places within a byte, see `bit_lanes`."""
    digits = [(packed // jnp.uint8(3**digit)) % jnp.uint8(3) for digit in range(TRITS)]
    return [digit.astype(jnp.int8) - jnp.int8(1) for digit in digits]


def codes_together(bits: int, ternary: bool = False) -> int:
    """The least number of codes that fill whole bytes."""
    return TRITS if ternary else _lanes(bits)


def _lanes(bits: int) -> int:
    """The least number of codes that fill whole bytes."""
    return 1 if bits == 8 else 8 // bits if bits in (1, 2, 4) else 4 if bits == 6 else 8


def _padded(array: Array, multiple: int) -> Array:
    missing = -array.shape[-1] % multiple
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array
