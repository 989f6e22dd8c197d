"""Codes at their true width."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.ops.formats.packing import pack_bits, pack_trits, packed_size, unpack_bits, unpack_trits


@functools.cache
def packed_in(bits):
    return jax.jit(lambda codes: pack_bits(codes, bits))


@functools.cache
def unpacked_from(bits, count, signed):
    return jax.jit(lambda packed: unpack_bits(packed, bits, count, signed))


def words(packed):
    return np.asarray(packed).view("<u4").tolist()


@pytest.mark.parametrize("bits", range(1, 8))
@settings(max_examples=6)
@given(st.integers(0, 10**6))
def test_packed_codes_come_back_and_are_a_dense_little_endian_bitstream(bits, seed):
    rows, columns = 2, 19
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    packed = packed_in(bits)(codes)
    assert packed.shape == (rows, packed_size(columns, bits)) and packed.dtype == jnp.uint8
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits].reshape(rows, -1)
    np.testing.assert_array_equal(packed, np.packbits(stream, axis=-1, bitorder="little"))
    np.testing.assert_array_equal(unpacked_from(bits, columns, False)(packed), codes)
    signed = codes.astype(np.int8) - (codes >> (bits - 1)).astype(np.int8) * 2 ** (bits - 1) * 2
    np.testing.assert_array_equal(packed_in(bits)(signed), packed)
    np.testing.assert_array_equal(unpacked_from(bits, columns, True)(packed), signed)


@settings(max_examples=6)
@given(st.integers(0, 10**6), st.sampled_from([5, 12]))
def test_ternary_digits_go_five_to_a_byte(seed, columns):
    rows = 2
    codes = np.random.default_rng(seed).integers(-1, 2, (rows, columns)).astype(np.int8)
    packed = pack_trits(jnp.asarray(codes))
    assert packed.shape == (rows, -(-columns // 5)) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack_trits(packed, columns), codes)


def test_bytes_and_words_are_those_of_published_stores():
    eight = jnp.asarray([-8, -7, -1, 0, 1, 2, 6, 7], jnp.int8)
    assert bytes(np.asarray(pack_bits(eight, 4))).hex() == "980f2176"  # QuaRot: two's complement, low nibble first
    assert words(pack_bits(eight + 8, 4)) == [0xFEA98710]  # compressed-tensors: offset by 8
    assert words(pack_bits(jnp.arange(8, dtype=jnp.uint8), 4)) == [0x76543210]  # GPTQ
    three = pack_bits(jnp.arange(32, dtype=jnp.uint8) % 8, 3)
    assert words(three) == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]  # GPTQ at 3 bits


def test_a_row_is_packed_by_itself():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 8, (5, 11)), jnp.uint8)
    alone = [packed_in(3)(codes[row : row + 1])[0] for row in range(5)]
    np.testing.assert_array_equal(packed_in(3)(codes), alone)
