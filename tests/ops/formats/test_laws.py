"""What holds of every format."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.ops.formats.quantize import Extent, decode, encode, extent, fake, qparams, quantize
from sparsejax.ops.formats.rounding import rounded
from sparsejax.ops.formats.scales import effective
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import packed
from tests.ops.formats.samples import ALL, FLOATS, SHAPE, SYMMETRIC


def never_negative(spec):
    return spec.element.startswith("log")


def draw(seed, spec, shape=SHAPE):
    """A matrix of tails, with zeros in it; no less than zero where the format holds no less."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, shape) * 10.0 ** rng.integers(-3, 3) * (rng.random(shape) < 0.9)
    return np.asarray(np.abs(x) if never_negative(spec) else x, np.float32)


@functools.cache
def twice(text):
    """x -> what the format makes of it, as numpy arrays and compiled once: codes and parameters, the numbers that they stand
    for, those rounded again by the same parameters, the scales as numbers, and the codes as packed."""
    spec = FormatSpec.parse(text)

    @jax.jit
    def run(x):
        codes, found = quantize(x, spec)
        numbers = decode(codes, found, spec)
        again = decode(encode(numbers, found, spec), found, spec)
        tensor = packed(codes, found, spec, SHAPE, x.dtype)
        return Twice(codes, found, numbers, again, effective(found, spec), tensor, tensor.unpacked(), tensor.qparams)

    return lambda x: jax.device_get(run(x))


class Twice(NamedTuple):
    codes: Any
    found: Any
    numbers: Any
    again: Any
    scale: Any
    tensor: Any
    unpacked: Any
    qparams: Any


@pytest.mark.parametrize("text", ALL)
@settings(max_examples=4)
@given(st.integers(0, 10**6))
def test_rounding_twice_is_rounding_once_zeros_stay_and_codes_are_in_range(text, seed):
    spec = FormatSpec.parse(text)
    x = draw(seed, spec)
    made = twice(text)(x)
    codes, numbers = made.codes, made.numbers
    np.testing.assert_array_equal(made.again, numbers)
    assert np.isfinite(numbers).all()
    if spec.zero == "int" and spec.grid.holds_zero:
        np.testing.assert_array_equal(numbers[x == 0], 0)
    if spec.grid.signed:
        assert codes.min() >= spec.grid.least and codes.max() <= spec.grid.most and codes.dtype == jnp.int8
    elif codes.dtype == jnp.uint8:
        assert codes.max() < 2**spec.bits
    scale = made.scale
    assert scale.shape == tuple(length // size for length, size in zip(SHAPE, spec.block(SHAPE), strict=True))
    assert np.isfinite(scale).all()


@pytest.mark.parametrize("text", ALL)
def test_a_packed_weight_takes_its_true_bits_and_comes_back(text):
    spec = FormatSpec.parse(text)
    made = twice(text)(draw(15, spec))
    codes, tensor = made.codes, made.tensor
    bits = 7 * 8 / 32 if spec.element == "ternary" else spec.bits  # five to a byte, in whole bytes
    assert tensor.codes.nbytes == codes.size * bits / 8
    assert all(leaf.ndim == 2 for leaf in jax.tree.leaves(tensor))
    np.testing.assert_array_equal(np.asarray(made.unpacked).view(np.uint8), codes.view(np.uint8))
    jax.tree.map(np.testing.assert_array_equal, made.qparams, made.found)
    tensor.check("w")


@pytest.mark.parametrize("text", ALL)
def test_zeros_stay_zeros_and_what_is_no_number_makes_its_group_nan(text):
    spec = FormatSpec.parse(text)
    x = draw(1, spec)
    x[:, 8:16] = 0
    x[16:32] = 0
    whole = twice(text)(np.zeros(SHAPE, np.float32)).numbers
    np.testing.assert_array_equal(whole, 0)
    for bad in (np.nan, np.inf):
        x[40, 20] = bad
        numbers = twice(text)(x).numbers
        assert np.isnan(numbers[40, 20])
        rows, columns = spec.block(SHAPE)
        group = np.zeros(SHAPE, bool)
        group[40 // rows * rows :, 20 // columns * columns :][:rows, :columns] = True
        assert np.isnan(numbers[group]).all()
        assert spec.second != "none" or np.isfinite(numbers[~group]).all()


@pytest.mark.parametrize("text", ["int8", "int4:asym,group=8", "int3:group=8,axis=-1", "int4:asym,token,zero=min"])
def test_integers_err_by_half_a_step_within_their_range(text):
    spec = FormatSpec.parse(text)
    x = draw(2, spec)
    made = twice(text)(x)
    steps = made.scale.astype(np.float64)
    steps = np.repeat(np.repeat(steps, SHAPE[0] // steps.shape[0], 0), SHAPE[1] // steps.shape[1], 1)
    error = np.abs(made.numbers.astype(np.float64) - x) / steps
    # A scale rounded to half precision moves the ends of the range, and so does a zero rounded to a code.
    edge = 0.5 if spec.symmetric == "asym" and spec.zero == "int" else 0.01
    assert error.max() <= 0.5 + edge and np.mean(error <= 0.5 + 1e-3) > 0.8


@pytest.mark.parametrize("text", [*SYMMETRIC, *FLOATS])
def test_negation_negates(text):
    x = draw(3, FormatSpec.parse(text))
    np.testing.assert_array_equal(twice(text)(-x).numbers, -twice(text)(x).numbers)


@pytest.mark.parametrize("text", ["mxfp4", "mxfp6_e3m2", "mxint8:rule=rne", "int8", "nvfp4", "fp8_e4m3"])
def test_a_power_of_two_goes_into_the_scales(text):
    spec = FormatSpec.parse(text)
    x = draw(4, spec)
    plain, scaled = twice(text)(x), twice(text)(x * 8)
    np.testing.assert_array_equal(scaled.codes.view(np.uint8), plain.codes.view(np.uint8))
    np.testing.assert_array_equal(scaled.numbers, plain.numbers * 8)


def test_nvfp4_follows_any_factor():
    x = draw(5, FormatSpec.parse("nvfp4"))
    for factor in (0.1, 3.7):
        codes, others = (twice("nvfp4")(x * f).codes for f in (1, np.float32(factor)))
        assert np.mean(codes == others) > 0.999


@pytest.mark.parametrize(
    "text",
    [
        "int8", "int4:asym,group=8", "int4:asym,group=8,zero=float", "q4_1", "ternary:group=8", "fp8_e4m3",
        "fp8_e5m2:tensor", "fp6_e2m3:group=8,scale=bf16", "mxfp4", "nvfp4", "binary", "nf4:group=8,double",
        "fp4_bnb:group=8,scale=f16", "log2_4", "logsqrt2_4:token",
    ],
)  # fmt: skip
def test_stochastic_rounding_is_unbiased_within_the_range(text):
    spec, draws = FormatSpec.parse(text), 64
    made = twice(text)(draw(6, spec))
    # Between two numbers that the format holds, hence within its range.
    x = made.numbers * np.random.default_rng(0).uniform(0.3, 1, SHAPE).astype(np.float32)
    if never_negative(spec):
        x = np.maximum(x, made.scale * np.float32(spec.grid.values[-1]))
    stochastic = dataclasses.replace(spec, rounding="stochastic")

    @jax.jit
    def moments(x):
        many, shared = jnp.broadcast_to(x, (draws, *SHAPE)), jax.tree.map(lambda a: a[None], made.found)
        rounded = decode(encode(many, shared, stochastic, key=jax.random.key(8)), shared, spec)
        return jnp.mean(rounded, axis=0), jnp.std(rounded, axis=0), jnp.ptp(rounded, axis=0)

    mean, deviation, gap = (np.asarray(moment, np.float64) for moment in moments(x))
    moved = gap > 0
    assert moved.mean() > 0.1
    # Of one number: six standard errors of a coin. Of all, as they are and away from zero: four of their sum.
    assert (np.abs(mean - x)[moved] < 6 * gap[moved] / 2 / draws**0.5).all()
    for sign in (1, np.sign(x)):
        # In steps of each, or the largest numbers would outweigh the others.
        bias, error = ((sign * (mean - x))[moved] / gap[moved]).sum(), (deviation[moved] / gap[moved] / draws**0.5)
        assert abs(bias) < 4 * np.sqrt((error**2).sum())


def test_halves_go_where_the_rounding_says():
    halves = jnp.asarray([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997, -0.49999997, 8388609.0])
    wanted = {
        "even": [-2, -2, 0, 0, 2, 2, 0, 0, 8388609],
        "away": [-3, -2, -1, 1, 2, 3, 0, 0, 8388609],
        "half_up": [-2, -1, 0, 1, 2, 3, 0, 0, 8388609],
    }
    compiled = jax.jit(rounded, static_argnums=1)
    for rounding, expected in wanted.items():
        assert compiled(halves, rounding).tolist() == expected
    whole = np.arange(-300.0, 300, dtype=np.float32)
    assert compiled(whole, "stochastic", jax.random.key(0)).tolist() == whole.tolist()
    with pytest.raises(ConfigError, match="needs a random key"):
        rounded(halves, "stochastic")


@pytest.mark.parametrize(
    "text",
    [
        "int4:asym,group=24,ragged=tail", "nf4:group=24,double,ragged=pad", "ternary:group=24,ragged=tail", "mxfp4:ragged=pad",
        "int8:block=24x12,ragged=tail", "int8:block=24x12,ragged=pad",
    ],
)  # fmt: skip
def test_a_last_group_that_is_not_full_is_one_of_its_own(text):
    spec = FormatSpec.parse(text)
    x = draw(9, spec, (40, 20))

    @jax.jit
    def run(x):
        codes, found = quantize(x, spec)
        return codes, found, decode(codes, found, spec, x.shape), extent(x, spec).high

    codes, found, numbers, high = jax.tree.map(np.asarray, run(x))
    assert codes.shape == (spec.padded(x.shape) if spec.ragged == "pad" else x.shape)
    rows, columns = spec.block(x.shape)
    for row in range(found.scale.shape[0]):
        for column in range(found.scale.shape[1]):
            block = np.abs(x[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns])
            wanted = block.mean() if spec.statistic == "mean" else block.max()
            if spec.statistic != "range":
                np.testing.assert_allclose(high[row, column], wanted, rtol=1e-6)
    if spec.second == "none" and spec.granularity == "group" and spec.axis == -2:
        for part in (slice(0, rows), slice(rows, 40)):
            alone = dataclasses.replace(spec, ragged="error", size=(part.stop - part.start,))
            np.testing.assert_array_equal(numbers[part], jax.jit(lambda x, alone=alone: fake(x, alone))(x[part]))
    assert np.sum((numbers - x) ** 2) < 0.5 * np.sum(x**2)


@pytest.mark.parametrize("text", ["int4:asym,group=8", "nf4:group=8,double", "nvfp4"])
def test_leading_axes_are_as_each_matrix_alone(text):
    spec = FormatSpec.parse(text)
    stacked = np.stack([draw(seed, spec) for seed in range(6)]).reshape(2, 3, *SHAPE)
    numbers = jax.jit(lambda x: fake(x, spec))(stacked)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(numbers[index], twice(text)(stacked[index]).numbers)


@pytest.mark.parametrize("text", ["int8", "int4:asym,group=8"])
def test_compiled_and_eager_agree_bit_for_bit(text):
    spec = FormatSpec.parse(text)
    x = draw(10, spec)
    codes, found = quantize(jnp.asarray(x), spec)
    compiled = twice(text)(x)
    np.testing.assert_array_equal(codes, compiled.codes)
    jax.tree.map(np.testing.assert_array_equal, found, compiled.found)


@pytest.mark.parametrize("text", ["int3:group=8,axis=-1", "nf4:group=8,double", "nvfp4", "mxfp6_e3m2"])
def test_accelerators_are_given_the_same_program(text):
    spec = FormatSpec.parse(text)
    traced = jax.jit(lambda x: packed(*quantize(x, spec), spec, SHAPE, x.dtype).dequantize()).trace(draw(0, spec))
    for platform in ("tpu", "cuda"):
        assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_the_gradient_goes_straight_through():
    x, r = (jnp.asarray(draw(seed, FormatSpec("int4"))) for seed in (11, 12))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(r * fake(x, FormatSpec("int4")))))(x)
    np.testing.assert_array_equal(gradient, r)
    assert jax.eval_shape(lambda x: fake(x, FormatSpec("int4")), x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_static_format_takes_its_scales_from_calibration():
    spec = FormatSpec.parse("int8:tensor,static")
    x = jnp.asarray(draw(13, spec))
    for call in (qparams, quantize, fake):
        with pytest.raises(ConfigError, match="'int8:tensor,static': is static"):
            call(x, spec)
    clipped = Extent(jnp.full((1, 1), 0.5, jnp.float32))
    numbers = fake(jnp.asarray([[0.25, 2.0], [-3.0, 0.0]]), spec, within=clipped)
    np.testing.assert_allclose(numbers, [[64 * 0.5 / 127, 0.5], [-0.5, 0]], rtol=1e-6)
    found = qparams(x, spec, within=clipped)
    np.testing.assert_array_equal(fake(x, spec, parameters=found), fake(x, spec, within=clipped))


def test_a_calibrated_second_level_is_kept():
    spec = FormatSpec.parse("nvfp4")
    x = jnp.asarray(draw(14, spec))
    given = jnp.full((1, 1), 100.0, jnp.float32)
    found = jax.jit(lambda x: qparams(x, spec, second=given))(x)
    assert found.second == given
    wanted = np.minimum(np.abs(x).reshape(4, 16, -1).max(1) * 100 / 6, 448)
    np.testing.assert_allclose(np.asarray(found.scale, np.float32), wanted, rtol=1 / 16, atol=2**-10)


def test_a_scale_that_half_precision_cannot_hold_is_its_greatest_or_zero():
    spec = FormatSpec.parse("int4:group=8")
    x = jnp.asarray(np.r_[np.full(8, 1e30), np.full(8, 1e-30)][:, None], jnp.float32)
    numbers = np.asarray(jax.jit(fake, static_argnums=1)(x, spec))
    np.testing.assert_array_equal(numbers[:8], 7 * 65504)
    np.testing.assert_array_equal(numbers[8:], 0)


def test_a_vector_is_refused():
    with pytest.raises(ConfigError, match=r"last two axes of an array, this one has the shape \(4,\)"):
        fake(jnp.ones(4), FormatSpec("int8"))
