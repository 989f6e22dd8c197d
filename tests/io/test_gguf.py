"""The GGUF container: what is read, and that no file, however damaged, does more than raise one error that names it."""

import math
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.io.gguf import MAX_NESTING
from sparsejax.plugs import ConfigError

METADATA = {
    "general.architecture": "llama",
    "a.flag": True,
    "a.byte": (0, 255),
    "a.small": (1, -3),
    "a.big": (10, 2**63 + 5),
    "a.epsilon": 1e-5,
    "a.double": (12, 1 / 3),
    "a.words": ["one", "", "dr\N{LATIN SMALL LETTER E WITH ACUTE}"],
    "a.types": (5, [1, -2, 3]),
    "a.flags": [True, False],
    "a.nested": (9, [["x"], (4, [7, 8])]),
}
MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)
Q8 = struct.pack("<e", 0.5) + bytes(range(32))


def q8_rows(rows):
    return ((rows, 32), 8, Q8 * rows)


@pytest.fixture
def small(gguf_bytes):
    return gguf_bytes(METADATA, {"matrix": MATRIX, "codes": q8_rows(3)})


def refusal(open_bytes, data):
    with pytest.raises(ConfigError) as caught:
        open_bytes(data)
    assert "model.gguf" in str(caught.value)
    return str(caught.value)


def test_metadata_of_every_type_is_read(open_bytes, small):
    found = dict(open_bytes(small).metadata)
    nested = found.pop("a.nested")
    assert nested[0] == ["x"] and nested[1].tolist() == [7, 8]
    assert found.pop("a.types").tolist() == [1, -2, 3]
    assert found.pop("a.flags").tolist() == [True, False]
    assert found == {
        "general.architecture": "llama", "a.flag": True, "a.byte": 255, "a.small": -3, "a.big": 2**63 + 5, "a.epsilon": 1e-5,
        "a.double": 1 / 3, "a.words": ["one", "", "dr\N{LATIN SMALL LETTER E WITH ACUTE}"],
    }  # fmt: skip


def test_tensors_are_read_row_major_and_plain_ones_are_not_copied(open_bytes, small):
    gguf = open_bytes(small)
    assert gguf.block_types == {"matrix": "F32", "codes": "Q8_0"}
    assert {name: info.shape for name, info in gguf.tensors.items()} == {"matrix": (3, 4), "codes": (3, 32)}
    np.testing.assert_array_equal(gguf.read("matrix"), MATRIX)
    assert np.shares_memory(gguf.read("matrix"), gguf.data)
    np.testing.assert_array_equal(gguf.read("codes"), np.tile(np.arange(32, dtype=np.float32) / 2, (3, 1)))
    block, data = gguf.raw("codes")
    assert block == "Q8_0" and data.tobytes() == Q8 * 3 and np.shares_memory(data, gguf.data)


@pytest.mark.parametrize("name", ["matrix", "codes"])
def test_rows_are_those_of_the_whole_tensor(open_bytes, small, name):
    gguf = open_bytes(small)
    for start, stop in ((0, 3), (1, 2), (2, 9), (1, 1)):
        np.testing.assert_array_equal(gguf.read_rows(name, start, stop), gguf.read(name)[start:stop])


def test_rows_of_a_quantized_vector_are_its_elements(open_bytes, gguf_bytes):
    gguf = open_bytes(gguf_bytes({}, {"vector": ((64,), 8, Q8 * 2)}))
    np.testing.assert_array_equal(gguf.read_rows("vector", 3, 40), gguf.read("vector")[3:40])


def test_an_unknown_tensor_is_refused_with_the_nearest_name(open_bytes, small):
    with pytest.raises(ConfigError, match="'matrx'.*Did you mean 'matrix'"):
        open_bytes(small).read("matrx")


def test_a_wider_alignment_is_honoured(open_bytes, gguf_bytes):
    data = gguf_bytes({"general.alignment": 128}, {"a": MATRIX, "b": MATRIX + 1}, alignment=128)
    np.testing.assert_array_equal(open_bytes(data).read("b"), MATRIX + 1)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    from sparsejax.io.gguf import open_gguf

    with pytest.raises(ConfigError, match="no such file"):
        open_gguf(tmp_path / "none.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ConfigError, match="empty"):
        open_gguf(tmp_path / "empty.gguf")


@pytest.mark.parametrize("magic, version, message", [
    (b"GGML", 3, "begins with b'GGML'"),
    (b"GGUF", 1, "version 1;"),
    (b"GGUF", 2, "version 2;"),
    (b"GGUF", 4, "version 4;"),
    (b"GGUF", 3 << 24, "big-endian"),
])  # fmt: skip
def test_other_formats_and_versions_are_refused(open_bytes, small, magic, version, message):
    assert message in refusal(open_bytes, magic + struct.pack("<I", version) + small[8:])


HUGE = 2**62
BROKEN = {
    "a tensor count that lies": ({}, {}, {"counts": (5 * 10**9, 0)}, "claims 5000000000 tensors"),
    "a pair count that lies": ({}, {}, {"counts": (0, HUGE)}, f"claims {HUGE} metadata pairs"),
    "an element count that lies": ({}, {"t": ((1, 10**9), 0, b"")}, {}, "(1, 1000000000) in F32 is 4000000000 bytes"),
    "dimensions whose product overflows": ({}, {"t": ((HUGE, HUGE, HUGE), 0, b"")}, {}, "tensor 't': shape"),
    "too many dimensions": ({}, {"t": ((1,) * 5, 0, b"")}, {}, "tensor 't': claims 5 dimensions"),
    "no dimensions": ({}, {"t": ((), 0, b"1234")}, {}, "tensor 't': claims 0 dimensions"),
    "an empty dimension": ({}, {"t": ((3, 0), 0, b"")}, {}, "none may be 0"),
    "half a block": ({}, {"t": ((2, 16), 8, Q8)}, {}, "rows of 16 are not whole Q8_0 blocks of 32"),
    "a type that is not decoded": ({}, {"t": ((256,), 16, bytes(66))}, {}, "block type 16 (IQ2_XXS) is not supported"),
    "a type that does not exist": ({}, {"t": ((256,), 999, bytes(66))}, {}, "block type 999 (unknown)"),
    "a tensor twice": ({}, [("t", MATRIX), ("t", MATRIX)], {}, "tensor 't': the name is there twice"),
    "a key twice": ([("k", 1), ("k", 2)], {}, {}, "metadata 'k': the key is there twice"),
    "an odd alignment": ({"general.alignment": 48}, {}, {}, "'general.alignment' = 48"),
    "an alignment of zero": ({"general.alignment": 0}, {}, {}, "'general.alignment' = 0"),
    "an alignment that is text": ({"general.alignment": "32"}, {}, {}, "'general.alignment' = '32'"),
    "an unaligned offset": ({"general.alignment": 64}, {"a": MATRIX[:2], "b": MATRIX}, {}, "tensor 'b': its offset 32"),
    "text that is not UTF-8": ({"k": (8, b"\xff\xfe")}, {}, {}, "metadata 'k': b'\\xff\\xfe' is not UTF-8"),
    "a key that is not UTF-8": ([(b"\xc3", 1)], {}, {}, "metadata pair 0: b'\\xc3' is not UTF-8"),
    "an element that is not UTF-8": ({"k": (8, ["ok", b"\xff"])}, {}, {}, "metadata 'k'[1]: b'\\xff' is not UTF-8"),
    "a bool of 2": ({"k": (0, 2)}, {}, {}, "metadata 'k': a bool is stored as 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_does_not_hold_together_is_refused_by_name(open_bytes, gguf_bytes, case):
    metadata, tensors, options, message = BROKEN[case]
    data = gguf_bytes(metadata, tensors, **options)
    if case == "a bool of 2":
        data = data.replace(struct.pack("<IB", 0, 2), struct.pack("<IB", 7, 2))
    assert message in refusal(open_bytes, data)


def test_tensors_that_overlap_are_refused(open_bytes, gguf_bytes):
    data = gguf_bytes({}, {"a": MATRIX, "b": MATRIX})
    moved = data.replace(struct.pack("<IQ", 0, 64), struct.pack("<IQ", 0, 32))  # b's type and offset
    assert "tensor 'b' begins at byte 160, inside 'a'" in refusal(open_bytes, moved)


@pytest.mark.parametrize("offset", [2**40, 2**63, 2**64 - 32])
def test_an_offset_outside_of_the_file_is_refused(open_bytes, gguf_bytes, offset):
    data = gguf_bytes({}, {"a": MATRIX, "b": MATRIX})
    moved = data.replace(struct.pack("<IQ", 0, 64), struct.pack("<IQ", 0, offset))
    assert "tensor 'b': shape (3, 4)" in refusal(open_bytes, moved)


@pytest.mark.parametrize("length", [10**6, 2**40, 2**64 - 1])
def test_lengths_that_lie_are_refused_before_anything_is_allocated(open_bytes, gguf_bytes, length):
    text = gguf_bytes({"k": "vvvv"}, {}).replace(struct.pack("<Q", 4) + b"vvvv", struct.pack("<Q", length) + b"vvvv")
    assert f"metadata 'k': claims {length} bytes of text" in refusal(open_bytes, text)
    for kind, what in ((4, "numbers"), (7, "bools"), (8, "strings"), (9, "arrays")):
        array = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, kind, length)
        assert f"metadata 'k': claims {length} {what}" in refusal(open_bytes, array)
    inside = gguf_bytes({"k": ["ok", "vvvv"]}, {}).replace(struct.pack("<Q", 4) + b"vvvv", struct.pack("<Q", length) + b"vvvv")
    assert f"metadata 'k'[1]: claims {length} bytes of text" in refusal(open_bytes, inside)


@pytest.mark.parametrize("kind", [13, 99, 2**32 - 1])
def test_unknown_value_types_are_refused(open_bytes, kind):
    pair = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1s", 1, b"k")
    assert f"metadata 'k': value type {kind}" in refusal(open_bytes, pair + struct.pack("<I", kind) + bytes(32))
    assert f"array of value type {kind}" in refusal(open_bytes, pair + struct.pack("<IIQ", 9, kind, 1) + bytes(32))


def test_arrays_nested_too_deep_are_refused(open_bytes, gguf_bytes):
    value = ["x"]
    for _ in range(MAX_NESTING - 1):
        value = (9, [value])
    assert open_bytes(gguf_bytes({"k": value}, {})).metadata["k"] == [[[["x"]]]]
    assert "nested more than" in refusal(open_bytes, gguf_bytes({"k": (9, [value])}, {}))


def test_every_truncation_of_a_file_is_refused(open_bytes, small):
    for size in range(1, len(small) - 32):  # what follows the last tensor is padding
        refusal(open_bytes, small[:size])


def read_all(gguf):
    for name, info in gguf.tensors.items():
        array = gguf.read(name)
        assert array.shape == info.shape and array.dtype == info.dtype


def opens_or_refuses(open_bytes, data):
    """Within memory in proportion to the file."""
    tracemalloc.start()
    try:
        read_all(open_bytes(data))
    except ConfigError as error:
        assert "model.gguf" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**21 + 64 * len(data)


@settings(max_examples=300)
@given(st.data())
def test_flipped_bits_are_refused_or_read(open_bytes, gguf_bytes, data):
    content = bytearray(gguf_bytes(METADATA, {"matrix": MATRIX, "codes": q8_rows(2)}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    opens_or_refuses(open_bytes, bytes(content))


@settings(max_examples=300)
@given(st.data())
def test_replaced_words_are_refused_or_read(open_bytes, gguf_bytes, data):
    content = bytearray(gguf_bytes(METADATA, {"matrix": MATRIX, "codes": q8_rows(2)}))
    at = data.draw(st.integers(4, len(content) - 8))
    word = data.draw(st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
    content[at : at + 8] = struct.pack("<Q", word)
    opens_or_refuses(open_bytes, bytes(content))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_after_the_magic_number_are_refused_or_read(open_bytes, content):
    opens_or_refuses(open_bytes, b"GGUF" + struct.pack("<I", 3) + content)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from(["F32", "F16", "Q8_0", "Q4_K"])), max_size=5))
def test_files_of_any_shape_and_type_are_read_whole(open_bytes, gguf_bytes, chosen):
    sizes = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144)}
    tensors = {}
    for index, (rows, blocks, name) in enumerate(chosen):
        kind, elements, size = sizes[name]
        tensors[f"t{index}"] = ((rows, blocks * elements), kind, np.random.RandomState(index).bytes(rows * blocks * size))
    gguf = open_bytes(gguf_bytes({}, tensors))
    read_all(gguf)
    for name, (shape, _, data) in tensors.items():
        assert gguf.tensors[name].shape == shape and gguf.raw(name)[1].tobytes() == data


def test_smollm2_is_read_whole(smollm2):
    assert len(smollm2.tensors) == 272 and smollm2.metadata["llama.block_count"] == 30
    assert set(smollm2.block_types.values()) == {"F32", "Q4_1", "Q8_0"}
    total = 0
    for name, info in smollm2.tensors.items():
        array = smollm2.read(name)
        assert array.dtype == np.float32 and math.isfinite(float(array.min())) and math.isfinite(float(array.max()))
        total += math.prod(info.shape)
    assert total == 134_515_008
