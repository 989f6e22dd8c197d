"""What holds of every codec: words unpack to their codes, a kernel comes back bit for bit, and so do its tensors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.io import ggml_blocks
from sparsejax.io.codecs import ggml
from sparsejax.io.codecs.affine import from_words, words
from sparsejax.io.codecs.bitsandbytes import BitsAndBytes
from sparsejax.io.codecs.stores import EXPORTS, READERS
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import qtensor
from tests.compiled import dequantized

SHAPE = (64, 32)
GPTQ = ("int4:full15,group=32", "int4:asym,group=48,ragged=tail", "int3:narrow,scale=f16", "int2:asym,group=16,scale=bf16",
        "int8:asym,group=16")  # fmt: skip
TENSORS = (
    "int4:full15,group=32", "int4:asym,group=16", "int3:asym,scale=f32", "int4:tensor", "int8", "int8:asym", "int8:asym,tensor",
    "int8:group=16,scale=bf16", "fp8_e4m3", "fp8_e4m3:tensor,scale=bf16", "fp8_e4m3:block=24x16,ragged=tail,scale=f32", "mxfp4",
    "nvfp4",
)  # fmt: skip
CASES = [
    *(("gptq_v2", text) for text in GPTQ),
    ("gptq", GPTQ[0]),
    ("gptq", GPTQ[1]),
    *(("awq", text) for text in ("int4:asym,group=16", "int4:asym,scale=f16", "int4:narrow,group=32")),
    *(("compressed-tensors", text) for text in TENSORS),
    *(("bitsandbytes", text) for text in ("nf4:group=64", "nf4:group=16,double", "fp4_bnb:group=32,scale=f32")),
]


@functools.cache
def quantizer(text):
    return jax.jit(lambda w: qtensor(w, FormatSpec.parse(text)))


def weight(seed):
    """Numbers of many sizes, not centred, so that zeros differ; no group is of one sign."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=SHAPE) * np.exp(2 * rng.normal(size=(1, SHAPE[1]))) * (1 + (rng.random(SHAPE) < 0.3))
    w[::8], w[1::8] = np.abs(w[::8]), -np.abs(w[1::8])
    return jnp.asarray(w, jnp.float32)


def store_for(kind, spec):
    fitting = BitsAndBytes.fitting if kind == "bitsandbytes" else EXPORTS[kind]
    return fitting({"model.layers.0.x": spec}, ())


@pytest.mark.parametrize(("kind", "text"), CASES)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_kernel_comes_back_bit_for_bit(kind, text, seed):
    tensor = quantizer(text)(weight(seed))
    store = store_for(kind, tensor.spec)
    parts = store.encode("x", tensor)
    assert set(parts) <= set(store.suffixes) and store.mark in parts
    reader = READERS[kind.removesuffix("_v2")](store.document(), "config.json")
    assert reader.shape("x", parts) == SHAPE[::-1]
    again = reader.decode("x", parts, jnp.float32)
    again.check("x")
    np.testing.assert_array_equal(dequantized(again), dequantized(tensor))
    if kind != "awq" or tensor.spec.symmetric == "asym":
        np.testing.assert_array_equal(again.codes, tensor.codes)
        assert again.nbytes == tensor.nbytes
    once_more = reader.encode("x", again)
    jax.tree.map(np.testing.assert_array_equal, once_more, parts)


@pytest.mark.parametrize("name", ggml.NAMES)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_blocks_hold_a_kernel_bit_for_bit(name, seed):
    tensor = quantizer(ggml.NAMES[name])(weight(seed))
    kind, data = ggml.encode("x", tensor)
    assert kind == name
    np.testing.assert_array_equal(ggml_blocks.decode(name, data.ravel()).reshape(SHAPE[::-1]).T, dequantized(tensor))
    again = ggml.decode("x", name, data, SHAPE[0], jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again), jax.tree.leaves(tensor))


@pytest.mark.parametrize(
    ("bits", "count"), [(2, 1), (2, 32), (3, 10), (3, 33), (4, 1), (4, 33), (5, 10), (5, 32), (6, 33), (7, 32), (8, 10)]
)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 99))
def test_words_unpack_to_their_codes(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, count)).astype(np.uint8)
    stored = words(codes, bits)
    assert stored.dtype == np.int32 and stored.shape == (2, -(-count * bits // 32))
    np.testing.assert_array_equal(from_words(stored, bits, count), codes)
    number = sum(int(code) << bits * place for place, code in enumerate(codes[1]))
    assert int.from_bytes(stored[1].tobytes(), "little") == number


REFUSED = [
    ("gptq", "int4:narrow", "scale of int4 = 'f32': allowed are 'f16', 'bf16'"),
    ("gptq", "int5:full15,group=32", "element of int5.*allowed are 'int2', 'int3', 'int4', 'int8'"),
    ("gptq", "int4:asym,group=32,zero=float", "zero of .*allowed is 'int'"),
    ("gptq", "int4:group=8,axis=-1", "axis of .*allowed is -2"),
    ("gptq", "int4:tensor,scale=f16", "allowed are channel and group"),
    ("awq", "int8:asym,group=32", "allowed are 'int4'"),
    ("awq", "nf4:group=32", "element of nf4"),
    ("compressed-tensors", "nf4:group=32", "compressed-tensors has int2 to int8, fp8_e4m3, mxfp4 and nvfp4"),
    ("compressed-tensors", "mxint8", "scale of mxint8 = 'e8m0'"),
    ("compressed-tensors", "fp8_e4m3:token", "granularity of .*allowed are 'tensor', 'channel', 'block'"),
    ("compressed-tensors", "mxfp4:axis=-1", "groups lie along the inputs"),
    ("compressed-tensors", "fp4_e2m1:group=32", "allowed are 'mxfp4', 'nvfp4'"),
    ("bitsandbytes", "nf4:group=32,scale=f16", "scale of .*allowed are 'f32'"),
    ("bitsandbytes", "nf4:channel", "allowed are groups along the inputs"),
    ("bitsandbytes", "int4", "element of int4"),
]


@pytest.mark.parametrize(("kind", "text", "message"), REFUSED)
def test_a_format_that_cannot_be_represented_is_refused_by_name(kind, text, message):
    tensor = quantizer(text)(weight(0))
    with pytest.raises(ConfigError, match=message) as caught:
        store_for(kind, tensor.spec).encode("model.layers.0.x", tensor)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("q4_1:group=16", "Q4_1 has group=32"), ("int5:group=32,scale=bf16", "to be Q5_0 = 'bf16': allowed are 'f16'"),
     ("int4:asym,group=32", "zero of .*allowed are 'min'"), ("nf4:group=32", "allowed are 'q4_0'"), ("q4_0:axis=-1", "is -2")],
)  # fmt: skip
def test_a_format_without_blocks_is_refused_by_name(text, message):
    with pytest.raises(ConfigError, match=message):
        ggml.block_type(FormatSpec.parse(text), "x")
    assert ggml.block_type(FormatSpec.parse("int4:narrow,group=32"), "x") == "Q4_0"  # another rule of rounding, the same codes


def test_a_zero_of_zero_is_for_version_2_alone():
    tensor = quantizer("int4:asym,group=32")(jnp.abs(weight(0)))
    with pytest.raises(ConfigError, match="a zero = 0: .*allowed is gptq_v2"):
        store_for("gptq", tensor.spec).encode("x", tensor)
    store = store_for("gptq_v2", tensor.spec)
    parts = store.encode("x", tensor)
    np.testing.assert_array_equal(dequantized(store.decode("x", parts, jnp.float32)), dequantized(tensor))
    with pytest.raises(ConfigError, match="a stored zero = 15: .*allowed are 0 to 14"):
        dataclasses.replace(store, version=1).decode("x", {**parts, "qzeros": np.full_like(parts["qzeros"], -1)}, jnp.float32)


def sorted_tensor(text, seed=0):
    """A kernel whose inputs are in groups by some order, as GPTQ's dynamic order leaves it."""
    tensor, order = quantizer(text)(weight(seed)), np.random.default_rng(seed).permutation(SHAPE[0])
    index = np.empty((SHAPE[0], 1), np.uint16)
    index[order, 0] = np.arange(SHAPE[0]) // tensor.spec.size[0]
    return dataclasses.replace(tensor, spec=dataclasses.replace(tensor.spec, indexed=True), group_of=jnp.asarray(index))


@pytest.mark.parametrize(
    ("kind", "text"),
    [("gptq", "int4:full15,group=32"), ("gptq_v2", "int3:asym,group=16"), ("compressed-tensors", "int4:asym,group=16")],
)
def test_inputs_sorted_into_groups_come_back_bit_for_bit_and_are_named_in_the_config(kind, text):
    tensor = sorted_tensor(text)
    store = store_for(kind, tensor.spec)
    parts, document = store.encode("x", tensor), store.document()
    suffix = "weight_g_idx" if kind == "compressed-tensors" else "g_idx"
    assert parts[suffix].dtype == np.int32 and parts[suffix].tolist() == tensor.group_of[:, 0].tolist()
    named = document["config_groups"]["group_0"]["weights"]["actorder"] if suffix != "g_idx" else document["desc_act"]
    assert named == ("group" if suffix != "g_idx" else True)
    again = READERS[kind.removesuffix("_v2")](document, "c").decode("x", parts, jnp.float32)
    again.check("x")
    assert again.spec == tensor.spec
    jax.tree.map(np.testing.assert_array_equal, again, tensor)
    # The reader of the card: w[k, n] = (q - z) s of the group that g_idx gives to k.
    group, codes = np.asarray(tensor.group_of)[:, 0], np.asarray(tensor.unpacked(), np.float32)
    zero = 0 if tensor.zero is None else np.asarray(tensor.qparams.zero, np.float32)[group]
    np.testing.assert_array_equal(again.dequantize(), (codes - zero) * np.asarray(tensor.scale, np.float32)[group])


def test_groups_of_neighbours_need_no_index_whatever_the_config_says():
    tensor = quantizer("int4:full15,group=32")(weight(0))
    store = store_for("gptq", tensor.spec)
    parts = store.encode("x", tensor)
    again = READERS["gptq"]({**store.document(), "desc_act": True}, "c").decode("x", parts, jnp.float32)
    assert again.spec == tensor.spec and again.group_of is None
    with pytest.raises(ConfigError, match=r"x.g_idx: groups of inputs \[3\] = \[2\]: there are 2"):
        store.decode("x", {**parts, "g_idx": np.where(np.arange(SHAPE[0]) == 3, 2, parts["g_idx"])}, jnp.float32)


def test_a_store_without_an_index_refuses_inputs_that_were_sorted():
    tensor = sorted_tensor("int4:asym,group=16")
    with pytest.raises(ConfigError, match="indexed of .*the inputs of a group must be neighbours"):
        store_for("awq", tensor.spec)
    sorted_fp4 = FormatSpec.parse("mxfp4:indexed")
    with pytest.raises(ConfigError, match="indexed of mxfp4:indexed = True: is for integers"):
        store_for("compressed-tensors", sorted_fp4)


@pytest.mark.parametrize(("kind", "text"), [CASES[0], CASES[7], CASES[10], CASES[11], CASES[18], CASES[21], CASES[24]])
def test_a_part_that_is_missing_or_misshapen_is_named(kind, text):
    tensor = quantizer(text)(weight(0))
    store = store_for(kind, tensor.spec)
    parts = store.encode("x", tensor)
    for suffix, array in parts.items():
        halved = {**parts, suffix: array.reshape(-1)[: array.size // 2]}
        for changed in ({name: one for name, one in parts.items() if name != suffix}, halved):
            with pytest.raises(ConfigError, match=r"^x[.:]"):
                store.decode("x", changed, jnp.float32)
