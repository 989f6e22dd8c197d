"""Bytes that others wrote: packing words of the reference implementations, and ggml's blocks."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.io import ggml_blocks
from sparsejax.io.codecs import ggml
from sparsejax.io.codecs.affine import words
from sparsejax.io.codecs.awq import Awq
from sparsejax.io.codecs.compressed_tensors import CompressedTensors
from sparsejax.io.codecs.gptq import Gptq
from sparsejax.io.codecs.host import held
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.quantized_arrays import qtensor


def kernel(text, codes, zero=None, scale=1.0):
    """A kernel of given codes [in, out] with one scale for all."""
    spec, codes = FormatSpec.parse(text), np.asarray(codes)
    groups = (1, codes.shape[1])
    scales = np.full(groups, scale, np.float16)
    zeros = None if zero is None else np.full(groups, zero, np.uint8)
    signed = np.int8 if spec.symmetric != "asym" else np.uint8
    return held(codes.astype(signed), scales, spec, np.float32, zero=zeros)


def word(array):
    return f"{np.asarray(array).ravel().view(np.uint32)[0]:08x}"


def test_gptq_packs_along_the_inputs_and_version_1_takes_one_off_the_zeros():
    tensor = kernel("int4:asym,channel,scale=f16", np.repeat(np.arange(8)[:, None], 8, 1), 7)
    first, second = (Gptq(4, 0, False, version).encode("x", tensor) for version in (1, 2))
    assert word(first["qweight"]) == word(second["qweight"]) == "76543210" and first["qweight"].shape == (1, 8)
    assert (word(first["qzeros"]), word(second["qzeros"])) == ("66666666", "77777777")
    assert first["g_idx"].tolist() == [0] * 8


def test_gptq_codes_of_three_bits_lie_across_words():
    assert [f"{one:08x}" for one in words(np.arange(32) % 8, 3).view(np.uint32)] == ["88fac688", "c688fac6", "fac688fa"]


def test_awq_interleaves_columns():
    tensor = kernel("int4:asym,channel,scale=f16", np.arange(8)[None], 8)
    assert word(Awq(0).encode("x", tensor)["qweight"]) == "75316420"


def test_compressed_tensors_adds_half_the_range():
    tensor = kernel("int4:full15,channel,scale=f16", np.array([-8, -7, -1, 0, 1, 2, 6, 7])[:, None])
    store = CompressedTensors.fitting({"x": tensor.spec}, ())
    parts = store.encode("x", tensor)
    assert word(parts["weight_packed"]) == "fea98710" and parts["weight_shape"].tolist() == [1, 8]
    assert np.asarray(tensor.codes)[:, 0].tolist() == [8, 9, 15, 0, 1, 2, 6, 7]  # two's complement, one row to a byte here


# V: x_i = ((37 i + 11) mod 64 - 32) / 16, and what ggml's C code makes of it.
V = np.array([((37 * i + 11) % 64 - 32) / 16 for i in range(32)], np.float32)
GGML = {
    "Q4_0": "0034730c953fc851ea841da63fd962fb842e",
    "Q4_1": "113400c0730c952ec851ea731da63fc862fb841d",
    "Q5_0": "00305aad546ae6083b5d80a2d5f72a4c7f91c4e6193b",
    "Q5_1": "df2f00c05aad546ae6083b5d80a2d5f72a4c7f91c4e6193b",
    "Q8_0": "0824ad40d467fc9124b94be073089d30c457ec8114a93cd063f88d20b547dc6f0499",
    "MXFP4": "7e9de41bd540bd520ce42ac640ad530cd5",
}


@pytest.mark.parametrize("name", GGML)
def test_ggml_blocks_have_its_bytes(name):
    tensor = qtensor(jnp.asarray(V[:, None]), ggml.SPECS[name])
    found, data = ggml.encode("x", tensor)
    # Halves go to the lower magnitude in ggml's MXFP4, to the even code in OCP's; its zeros have no sign.
    assert found == name and (name == "MXFP4" or data.tobytes().hex() == GGML[name])
    golden = np.frombuffer(bytes.fromhex(GGML[name]), np.uint8)
    back = ggml.decode("x", name, golden, 32, np.float32)
    np.testing.assert_array_equal(np.asarray(back.dequantize())[:, 0], ggml_blocks.decode(name, golden))
    np.testing.assert_array_equal(ggml.encode("x", back)[1].ravel(), golden)


def test_mxfp4_and_nvfp4_have_the_codes_of_ocp_with_even_inputs_low():
    mx = qtensor(jnp.asarray(V[:, None]), FormatSpec.parse("mxfp4"))
    parts = CompressedTensors.fitting({"x": mx.spec}, ()).encode("x", mx)
    expected = [13, 4, 11, 5, 8, 14, 2, 12, 4, 10, 6, 0, 13, 3, 12, 5]
    packed = parts["weight_packed"][0]
    assert np.stack([packed & 15, packed >> 4], -1).ravel()[:16].tolist() == expected
    assert parts["weight_scale"].tolist() == [[126]]
    nv = qtensor(jnp.asarray(V[:16, None]), FormatSpec.parse("nvfp4"))
    parts = CompressedTensors.fitting({"x": nv.spec}, ()).encode("x", nv)
    packed = parts["weight_packed"][0]
    assert np.stack([packed & 15, packed >> 4], -1).ravel().tolist() == [14, 5, 12, 7, 8, 15, 4, 14, 6, 11, 7, 1, 15, 4, 13, 6]
    assert parts["weight_scale"].astype(np.float32).tolist() == [[448]]
    np.testing.assert_allclose(parts["weight_global_scale"], 1483.0344828, rtol=1e-6)
