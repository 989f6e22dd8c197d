"""Few rows times weights in their formats: packed rows are read one by one, and the result is the dequantized product's."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.arrays import FEW_ROWS, QuantizedActivation, SparseActivation, matmul
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.quantized_arrays import qtensor

FORMATS = (
    "int8", "int8:tensor", "int4:full15", "int4:token", "int4:asym,group=16,ragged=tail", "int3:group=32,ragged=tail",
    "int4:asym,zero=float,group=16,ragged=tail", "int6:group=16,ragged=pad", "int5:block=16x8,ragged=tail",
    "int4:group=8,axis=-1,ragged=tail", "ternary", "binary", "nf4:group=16,ragged=tail", "nf4:group=16,double,ragged=tail",
    "mxfp4:ragged=tail", "nvfp4:ragged=tail", "fp8_e4m3", "q4_1:ragged=tail", "log2_4:group=16,ragged=tail",
)  # fmt: skip
SHAPE = (70, 37)  # no multiple of lanes, groups or unrolled steps
product = jax.jit(matmul, static_argnames="out_dtype")


def stored(spec, seed=0, shape=SHAPE):
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    w[3] *= 40
    return qtensor(jnp.asarray(w), FormatSpec.parse(spec))


def exact(x, w):
    return np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)


@pytest.mark.parametrize(("spec", "lead"), list(zip(FORMATS, itertools.cycle([(), (3,), (1, 2)]), strict=False)))
def test_every_format_gives_the_product_of_what_it_stands_for(spec, lead):
    rng, w = np.random.default_rng(0), stored(spec)
    x = jnp.asarray(rng.normal(size=(*lead, SHAPE[0])), jnp.float32)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5 * np.abs(np.asarray(w.dequantize())).max())
    close(product(x, w), exact(x, w))
    for share in (0, 0.1, 0.6):
        mask = jnp.asarray(rng.random(x.shape) < share)
        close(product(SparseActivation(x, mask, executor="gathered"), w), exact(jnp.where(mask, x, 0), w))


def test_rows_of_groups_that_are_no_neighbours_have_the_scales_of_their_group():
    rng, plain = np.random.default_rng(0), stored("int4:asym,group=16,ragged=tail")
    group_of = jnp.asarray(rng.permutation(np.arange(SHAPE[0]) // 16)[:, None], jnp.uint16)
    w = dataclasses.replace(plain, spec=dataclasses.replace(plain.spec, indexed=True), group_of=group_of)
    x = jnp.asarray(rng.normal(size=(2, SHAPE[0])), jnp.float32)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-3)
    close(product(x, w), exact(x, w))
    mask = jnp.asarray(rng.random(x.shape) < 0.3)
    close(product(SparseActivation(x, mask, executor="gathered"), w), exact(jnp.where(mask, x, 0), w))


@pytest.mark.parametrize("spec", ["int8", "int4", "ternary"])
def test_products_of_integers_are_exact_however_many_rows(spec):
    rng, w = np.random.default_rng(0), stored(spec, shape=(2100, 5))
    codes = jnp.asarray(rng.choice([-127, 127], (FEW_ROWS + 1, 2100)), jnp.int8)
    operand = QuantizedActivation(codes, jnp.ones((FEW_ROWS + 1, 1)), None, jnp.dtype("float32"))
    few = jax.tree.map(lambda a: a[:2], operand)
    sums = np.asarray(codes, np.int64) @ np.asarray(w.unpacked(), np.int64)
    scale = np.broadcast_to(np.asarray(w.qparams.scale, np.float32), (1, 5))
    np.testing.assert_array_equal(product(operand, w), sums.astype(np.float32) * scale)
    np.testing.assert_array_equal(product(few, w), product(operand, w)[:2])
    masked = SparseActivation(few, jnp.asarray(rng.random((2, 2100)) < 0.3))
    sums = np.asarray(jnp.where(masked.mask, few.codes, 0), np.int64) @ np.asarray(w.unpacked(), np.int64)
    np.testing.assert_array_equal(product(masked, w), sums.astype(np.float32) * scale)


def test_rows_that_only_zeros_meet_are_not_read():
    w = stored("int4:asym,group=16,ragged=tail")
    mask = jnp.arange(SHAPE[0])[None] < jnp.asarray([[20], [40]])
    x = jnp.ones((2, SHAPE[0])).at[:, 40:].set(jnp.nan)
    expected = product(SparseActivation(x, mask, executor="gathered"), w)
    np.testing.assert_allclose(expected, exact(mask, w), rtol=1e-5, atol=1e-4)
    other = dataclasses.replace(w, codes=w.codes.at[40:].set(255))
    np.testing.assert_array_equal(product(SparseActivation(x, mask, executor="gathered"), other), expected)


def test_nothing_is_dequantized_for_a_token_and_once_for_many():
    shape = (512, 512)
    w = jax.eval_shape(lambda: stored("int4:asym,group=64", shape=shape))
    compiled = [
        jax.jit(lambda x, w: matmul(x, w)).lower(jax.ShapeDtypeStruct((rows, 512), jnp.float32), w).compile()
        for rows in (1, FEW_ROWS + 1)
    ]
    one, many = (program.memory_analysis().temp_size_in_bytes for program in compiled)
    assert one < 2**16 and many >= 4 * 512 * 512


def test_gradients_are_those_of_the_dequantized_product():
    w = stored("nf4:group=16,ragged=tail")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, SHAPE[0])), jnp.float32)
    mask = jnp.arange(SHAPE[0]) % 3 > 0

    def loss(x, gradient):
        return jnp.sum(jnp.square(matmul(SparseActivation(x, jnp.broadcast_to(mask, x.shape), gradient), w)))

    through = 2 * exact(jnp.where(mask, x, 0), w) @ np.asarray(w.dequantize(), np.float64).T
    for gradient, expected in (("masked", np.where(mask, through, 0)), ("straight_through", through)):
        np.testing.assert_allclose(jax.jit(jax.grad(loss), static_argnums=1)(x, gradient), expected, rtol=1e-4, atol=1e-4)


def test_no_rows_give_no_rows_and_gradients_have_derivatives():
    w = stored("int4:full15")
    assert product(jnp.zeros((0, SHAPE[0])), w).shape == (0, SHAPE[1])
    codes = QuantizedActivation(jnp.zeros((0, SHAPE[0]), jnp.int8), jnp.zeros((0, 1)), None, jnp.dtype("float32"))
    assert product(codes, w).shape == (0, SHAPE[1])
    x = jnp.ones((2, SHAPE[0]))
    turned = jax.jvp(jax.grad(lambda x: jnp.sum(jnp.square(matmul(x, w)))), (x,), (x,))[1]
    dense = np.asarray(w.dequantize(), np.float64)
    np.testing.assert_allclose(turned, 2 * np.asarray(x) @ dense @ dense.T, rtol=1e-4, atol=1e-2)
