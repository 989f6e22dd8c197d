"""Block decoders against a slow scalar decoder, published golden bytes, and recorded outputs of the gguf package."""

import hashlib
import math
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.io.ggml_blocks import BLOCK_TYPES, BY_NAME, CHUNK, OTHER_TYPES, decode

QUANTIZED = [block.name for block in BLOCK_TYPES.values() if block.plain is None]
E2M1 = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
# V: x_i = ((37 i + 11) mod 64 - 32) / 16. What ggml's C quantizers make of it: bytes, sum, sum of (i + 1) x_i, squared error.
V = np.array([((37 * i + 11) % 64 - 32) / 16 for i in range(32)])
GOLDEN = {
    "Q4_0": ("0034730c953fc851ea841da63fd962fb842e", -2, -42, 0.1875),
    "Q4_1": ("113400c0730c952ec851ea731da63fc862fb841d", -3.0039062, -61.763672, 0.1596632),
    "Q5_0": ("00305aad546ae6083b5d80a2d5f72a4c7f91c4e6193b", -2, -43, 0.0625),
    "Q5_1": ("df2f00c05aad546ae6083b5d80a2d5f72a4c7f91c4e6193b", -2.9990234, -59.322754, 0.042446911),
    "Q8_0": ("0824ad40d467fc9124b94be073089d30c457ec8114a93cd063f88d20b547dc6f0499", -2.9919434, -59.004272, 6.6745e-4),
    "MXFP4": ("7e9de41bd540bd520ce42ac640ad530cd5", -3.25, -63.25, 0.46875),
}
# SHA-256 of what gguf 0.19 (`gguf.quants.dequantize`) makes of 64 blocks of `RandomState(type number).bytes`, NaN set to 0.
RECORDED = {
    "Q4_0": "5d7b5f7d4bf7919a",
    "Q4_1": "3e7efb0012d65fbc",
    "Q5_0": "28f696fcd8224d4b",
    "Q5_1": "e0dbf93f370971ae",
    "Q8_0": "00299c1a696e5ede",
    "MXFP4": "9058514e820b4434",
    "Q2_K": "15d47f1285683e2f",
    "Q3_K": "4ef0bd16ccd07ae9",
    "Q4_K": "be515f192c3b228c",
    "Q5_K": "cb28ba302eae0605",
    "Q6_K": "03dc3c0d9e0f20c4",
}


def half(block, start):
    return np.float32(np.frombuffer(block[start : start + 2], "<f2")[0])


def signed(byte):
    return byte - 256 if byte > 127 else byte


def k_scale(b, j):
    """Scale and minimum j of the twelve bytes of Q4_K and Q5_K."""
    if j < 4:
        return b[j] & 63, b[j + 4] & 63
    return (b[j + 4] & 15) | b[j - 4] >> 6 << 4, b[j + 4] >> 4 | b[j] >> 6 << 4


def q3_scale(b, j):
    return ((b[j % 8] >> 4 * (j // 8)) & 15 | ((b[8 + j % 4] >> 2 * (j // 4)) & 3) << 4) - 32


def scalar(name, block, i):
    """Scale, code, and what is subtracted, of element i of a block: (s, q, m) of s * q - m; m None: nothing is."""
    nibble = block[-16 + i % 16] >> 4 * (i // 16) & 15
    n, k, lane = i // 128, i % 128 // 32, i % 32
    fifth = {"Q5_0": 2, "Q5_1": 4}.get(name)
    if fifth:
        nibble += 16 * (int.from_bytes(block[fifth : fifth + 4], "little") >> i & 1)
    if name in ("Q4_0", "Q5_0"):
        return half(block, 0), nibble - (8 if name == "Q4_0" else 16), None
    if name in ("Q4_1", "Q5_1"):
        return half(block, 0), nibble, -half(block, 2)
    if name == "Q8_0":
        return half(block, 0), signed(block[2 + i]), None
    if name == "MXFP4":
        return np.float32(math.ldexp(1, block[0] - 128)), E2M1[nibble], None
    if name == "Q2_K":
        scale, code = block[i // 16], block[16 + 32 * n + lane] >> 2 * k & 3
        return half(block, 80) * np.float32(scale & 15), code, half(block, 82) * np.float32(scale >> 4)
    if name == "Q3_K":
        code = (block[32 + 32 * n + lane] >> 2 * k & 3) - (0 if block[lane] >> (4 * n + k) & 1 else 4)
        return half(block, 108) * np.float32(q3_scale(block[96:108], i // 16)), code, None
    if name == "Q6_K":
        low = block[64 * n + 32 * (k % 2) + lane] >> 4 * (k // 2) & 15
        code = (low | (block[128 + 32 * n + lane] >> 2 * k & 3) << 4) - 32
        return half(block, 208) * np.float32(signed(block[192 + i // 16])), code, None
    scale, minimum = k_scale(block[4:16], i // 32)
    code = block[(16 if name == "Q4_K" else 48) + 32 * (i // 64) + lane] >> 4 * (i % 64 // 32) & 15
    if name == "Q5_K":
        code += 16 * (block[16 + lane] >> (i // 32) & 1)
    return half(block, 0) * np.float32(scale), code, half(block, 2) * np.float32(minimum)


def slow(name, data):
    block, out = BY_NAME[name], []
    for start in range(0, len(data), block.size):
        for element in range(block.elements):
            scale, code, minimum = scalar(name, data[start : start + block.size], element)
            product = scale * np.float32(code)
            out.append(product if minimum is None else product - minimum)
    return np.array(out, np.float32)


@pytest.mark.parametrize("name", QUANTIZED)
@given(st.data())
def test_random_blocks_decode_as_the_scalar_definition_does(name, data):
    raw = data.draw(st.binary(min_size=BY_NAME[name].size, max_size=BY_NAME[name].size))
    with np.errstate(all="ignore"):
        expected = slow(name, raw)
    np.testing.assert_array_equal(decode(name, np.frombuffer(raw, np.uint8)), expected)


@pytest.mark.parametrize("name", QUANTIZED)
def test_decoded_numbers_equal_those_of_the_gguf_package_bit_for_bit(name):
    number = next(number for number, block in BLOCK_TYPES.items() if block.name == name)
    raw = np.frombuffer(np.random.RandomState(number).bytes(64 * BY_NAME[name].size), np.uint8)
    found = decode(name, raw)
    found = np.where(np.isnan(found), np.float32(0), found).astype("<f4")
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == RECORDED[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_of_ggml_decode_to_its_sums(name):
    text, total, weighted, error = GOLDEN[name]
    found = decode(name, np.frombuffer(bytes.fromhex(text), np.uint8)).astype(np.float64)
    sums = found.sum(), (np.arange(1, 33) * found).sum(), ((found - V) ** 2).sum()
    np.testing.assert_allclose(sums, (total, weighted, error), rtol=1e-5)


@pytest.mark.parametrize("name", QUANTIZED)
def test_infinite_and_nan_scales_decode_without_a_warning(name):
    block = BY_NAME[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fill in (0x7C, 0xFC, 0x7E, 0xFF, 0x00):
            assert decode(name, np.full(3 * block.size, fill, np.uint8)).shape == (3 * block.elements,)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_tensor_of_several_chunks_decodes_as_its_blocks_do(name):
    block = BY_NAME[name]
    count = CHUNK // block.elements + 3
    raw = np.frombuffer(np.random.RandomState(0).bytes(count * block.size), np.uint8)
    whole = decode(name, raw)
    assert whole.shape == (count * block.elements,)
    for start in (0, count - 4, count - 1):
        alone = decode(name, raw[start * block.size : (start + 1) * block.size])
        np.testing.assert_array_equal(whole[start * block.elements : (start + 1) * block.elements], alone)


@pytest.mark.parametrize("name, dtype", [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_plain_types_are_views_of_their_bytes(name, dtype):
    numbers = np.array([1.5, -2, 0, 0.25], dtype)
    raw = np.frombuffer(numbers.tobytes(), np.uint8)
    found = decode(name, raw)
    assert found.dtype == dtype and np.shares_memory(found, raw)
    np.testing.assert_array_equal(found, numbers)


def test_no_type_is_both_decoded_and_refused():
    assert not set(BLOCK_TYPES) & set(OTHER_TYPES)
    assert len(BY_NAME) == len(BLOCK_TYPES)
