"""QTensor: what a weight in a number format takes, and where it goes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sparsejax.arrays import QuantizedActivation, SparseActivation, dense, kind, matmul
from sparsejax.io.safetensors_file import open_safetensors, write_safetensors
from sparsejax.ops.formats.quantize import decode, quantize
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.parallel import rules
from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.mesh import make_mesh
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import QTensor, fit_side_by_side, packed, qtensor, side_by_side
from sparsejax.train.checkpoint import Checkpoints, Record, restore
from tests.compiled import dequantized
from tests.ops.formats.samples import SHAPE

SOME = ("int4", "int3:asym,group=16", "fp8_e4m3", "mxfp6_e3m2", "nf4:group=8,double", "nvfp4", "ternary:group=8")


def weight(lead=(), shape=SHAPE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*lead, *shape)), jnp.float32)


@functools.cache
def stored(text, lead=()):
    return jax.jit(lambda w: qtensor(w, FormatSpec.parse(text)))(weight(lead))


@pytest.mark.parametrize("text", ["int3:asym,group=16", "ternary:block=8x16", "nvfp4"])
def test_rows_of_any_length_are_packed_by_themselves(text):
    spec = dataclasses.replace(FormatSpec.parse(text), ragged="tail")
    w = weight(shape=(40, 27))

    @jax.jit
    def run(w):
        codes, found = quantize(w, spec)
        tensor = packed(codes, found, spec, (40, 27), w.dtype)
        return tensor, decode(codes, found, spec), tensor.dequantize()

    tensor, numbers, dequantized = run(w)
    np.testing.assert_array_equal(dequantized, numbers)
    assert tensor.codes.shape == (40, {"int3": 11, "ternary": 6, "fp4_e2m1": 14}[spec.element])
    assert tensor.nbytes == sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(tensor))
    assert tensor.bits_per_weight == 8 * tensor.nbytes / (40 * 27)


def test_a_surrogate_is_not_stored():
    tensor = stored("int4")
    assert dataclasses.replace(tensor, surrogate=weight()).nbytes == tensor.nbytes == 64 * 16 + 4 * 32


@pytest.mark.parametrize("text", ["int3:asym,group=16", "nvfp4"])
def test_stacked_layers_are_scanned_as_each_alone(text):
    tensor, x = stored(text, (3,)), weight((), (5, SHAPE[0]), 1)
    _, found = jax.jit(lambda x, w: jax.lax.scan(lambda x, layer: (x, matmul(x, layer)), x, w))(x, tensor)
    layers = [jax.tree.map(lambda a, i=index: np.asarray(a)[i], tensor) for index in range(3)]
    for index, layer in enumerate(layers):
        expected = np.asarray(x, np.float64) @ np.asarray(dequantized(layer))
        np.testing.assert_allclose(found[index], expected, rtol=1e-4, atol=1e-4)
    alone = jax.jit(lambda w: qtensor(w, FormatSpec.parse(text)))(np.asarray(weight((3,)))[1])
    jax.tree.map(np.testing.assert_array_equal, layers[1], alone)


def test_sharded_arrays_give_the_same_product():
    text = "nf4:group=8,double"
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=2))
    tensor, x = stored(text), weight((), (4, SHAPE[0]), 1)

    def put(leaf):
        return jax.device_put(leaf, jax.NamedSharding(mesh, rules.spec_for(("embed", "mlp"), leaf.shape, mesh)))

    sharded = jax.tree.map(put, tensor)
    assert sharded.codes.addressable_shards[0].data.size * 4 == tensor.codes.size
    product = jax.jit(matmul)
    np.testing.assert_allclose(product(put(x), sharded), product(x, tensor), rtol=1e-5, atol=1e-5)
    again = jax.jit(lambda w: qtensor(w, FormatSpec.parse(text)))(put(weight()))
    np.testing.assert_array_equal(again.codes, tensor.codes)  # the mean that `double` takes off is a sum, and may differ
    np.testing.assert_allclose(dequantized(again), dequantized(tensor), rtol=1e-6)


def test_a_donated_weight_is_used_up():
    tensor = stored.__wrapped__("int4:group=16")
    numbers = np.asarray(dequantized(tensor))
    negated = jax.jit(lambda w: dataclasses.replace(w, codes=w.codes ^ 0, scale=-w.scale), donate_argnums=0)(tensor)
    assert tensor.scale.is_deleted() and tensor.codes.is_deleted()
    np.testing.assert_array_equal(dequantized(negated), -numbers)


def test_every_format_is_restored_from_a_checkpoint(tmp_path):
    state = {name: stored(text, (2,)) for name, text in zip("abcdefg", SOME, strict=True)}
    checkpoints = Checkpoints(tmp_path / "ours", resumed_from=None)
    checkpoints.save_now(1, state, Record(1))
    checkpoints.close()
    ours = restore(tmp_path / "ours" / "1", jax.eval_shape(lambda: state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", state)
        checkpointer.wait_until_finished()
        plain = checkpointer.restore(tmp_path / "plain", jax.eval_shape(lambda: state))
    for again in (ours, plain):
        assert jax.tree.structure(again) == jax.tree.structure(state)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), again, state)


def test_every_format_is_written_to_safetensors(tmp_path):
    tensors = {text: stored(text, (2,)) for text in SOME}
    leaves = {
        f"{text}.{part}": np.asarray(leaf)
        for text, tensor in tensors.items() for part, leaf in vars(tensor).items() if isinstance(leaf, jax.Array)
    }  # fmt: skip
    write_safetensors(tmp_path, [(name, leaf.shape, leaf.dtype, lambda leaf=leaf: leaf) for name, leaf in leaves.items()])
    source = open_safetensors(tmp_path)
    for name, leaf in leaves.items():
        again = source.read(name)
        assert again.dtype == leaf.dtype
        assert again.tobytes() == leaf.tobytes()


@pytest.mark.parametrize("text", ["int4:asym,group=8", "mxfp4", "fp8_e4m3", "ternary", "int5:tensor"])
def test_products_are_those_of_the_dequantized_weight(text):
    w, x = stored(text), weight((), (3, SHAPE[0]), 1)
    codes = jnp.asarray(np.random.default_rng(2).integers(-127, 128, x.shape), jnp.int8)
    tokens = QuantizedActivation(codes, jnp.full((3, 1), 0.01), None, jnp.float32)
    integers = text in ("ternary", "int5:tensor")
    assert kind(w) == ("QTensor" if integers else f"QTensor[{text}]")
    for operand in (x, tokens, SparseActivation(x, codes > 0), SparseActivation(tokens, codes > 0)):
        exact = np.asarray(dense(operand), np.float64) @ np.asarray(dequantized(w), np.float64)
        np.testing.assert_allclose(matmul(operand, w), exact, rtol=1e-4, atol=1e-4)


def test_gradients_go_through_the_surrogate_of_any_format():
    w, x = weight(), weight((), (3, SHAPE[0]), 1)
    tensor = stored("mxfp4")
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(matmul(x, dataclasses.replace(tensor, surrogate=w)) ** 2)))(w)
    x = np.asarray(x, np.float64)
    np.testing.assert_allclose(gradient, 2 * x.T @ (x @ np.asarray(dequantized(tensor))), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "text", ["int4", "int4:asym,group=8,zero=min", "int4:asym,group=8,zero=float", "mxfp4", "int8:tensor", "int8:token"]
)
def test_outputs_are_scaled_without_touching_the_codes_where_that_can_be(text):
    tensor, factor = stored(text), jnp.asarray(np.linspace(0.5, 2, SHAPE[1], dtype=np.float32)[None])
    scaled = tensor.scaled(factor)
    np.testing.assert_allclose(jax.jit(dense)(scaled), dequantized(tensor) * np.asarray(factor), rtol=1e-5, atol=1e-6)
    assert isinstance(scaled, QTensor) == text.startswith("int4")
    if isinstance(scaled, QTensor):
        assert scaled.codes is tensor.codes
        scaled.check("w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scale=jnp.ones((2, 32), jnp.float16)), r"w.scale = .*2, 32.*: int4:group=8 of \(64, 32\) needs \(\(8, 32\)"),
        (dict(codes=jnp.ones((64, 32), jnp.int8)), "w.codes"),
        (dict(zero=jnp.ones((8, 16), jnp.uint8)), "w.zero"),
        (dict(codes=None), "w.codes"),
        (dict(codes=7), "w.codes = 7: expected an array"),
        (dict(shape=None), "w.shape = None: expected the sizes"),
        (dict(shape=(60, 32)), "60 channels are no multiple of 8"),
        (dict(spec=FormatSpec.parse("int4")), "w.scale"),
    ],
)
def test_arrays_that_the_format_does_not_have_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(stored("int4:group=8"), **change).check("w")


@pytest.mark.parametrize("spec", ["int4:asym,group=16", "int8", "int3:group=16", "ternary", "nf4:group=16", "mxfp4"])
def test_weights_of_one_input_lie_side_by_side(spec):
    rng = np.random.default_rng(0)
    parts = [qtensor(jnp.asarray(rng.normal(size=(2, 32, out)), jnp.float32), FormatSpec.parse(spec)) for out in (40, 80)]
    assert fit_side_by_side(parts)
    whole = side_by_side(parts)
    whole.check("whole")
    expected = np.concatenate([part.dequantize() for part in parts], axis=-1)
    np.testing.assert_array_equal(whole.dequantize(), expected)


def test_weights_that_share_bytes_or_scales_stay_apart():
    def pair(first, second, out=(40, 80)):
        return [qtensor(jnp.ones((32, n)), FormatSpec.parse(spec)) for spec, n in zip((first, second), out, strict=True)]

    assert not fit_side_by_side(pair("int4", "int8"))
    assert not fit_side_by_side(pair("int4", "int4", out=(39, 80)))
    for spec in ("int8:tensor", "int4:group=8,axis=-1", "nf4:group=16,double", "nvfp4"):
        assert not fit_side_by_side(pair(spec, spec))
    indexed = [dataclasses.replace(one, spec=FormatSpec.parse("int4:group=8,indexed")) for one in pair(*["int4:group=8"] * 2)]
    assert not fit_side_by_side(indexed)
