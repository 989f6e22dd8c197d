import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops.position_bias import (
    interpolate_positions,
    relative_bias,
    relative_position_buckets,
    resize_weights,
    sinusoidal_positions,
)
from sparsejax.plugs import ConfigError


def buckets_of(relative, **kwargs):
    return np.asarray(relative_position_buckets(jnp.asarray(relative), **kwargs)).tolist()


def test_causal_buckets_are_those_of_t5():
    """Golden values of Hugging Face's `_relative_position_bucket`, 32 buckets to distance 128."""
    relative = [5, 0, -1, -15, -16, -17, -18, -19, -20, -21, -22, -31, -32, -63, -64, -113, -127, -128, -5000]
    expected = [0, 0, 1, 15, 16, 16, 16, 17, 17, 18, 18, 21, 21, 26, 26, 31, 31, 31, 31]
    assert buckets_of(relative, bidirectional=False) == expected


def test_bidirectional_buckets_are_those_of_t5():
    relative = [0, -1, -7, -8, -11, -12, -15, -16, -23, -32, -64, -91, -128, 1, 7, 8, 12, 16, 32, 64, 127, 128, 5000]
    expected = [0, 1, 7, 8, 8, 9, 9, 10, 11, 12, 14, 15, 15, 17, 23, 24, 25, 26, 28, 30, 31, 31, 31]
    assert buckets_of(relative, bidirectional=True) == expected


@pytest.mark.parametrize(
    ("num_buckets", "max_distance", "bidirectional"), [(32, 128, False), (32, 128, True), (8, 20, True), (6, 50, False)]
)
def test_buckets_equal_the_formula_of_t5_away_from_boundaries(num_buckets, max_distance, bidirectional):
    side = num_buckets // 2 if bidirectional else num_buckets
    distances = list(range(-2 * max_distance, 2 * max_distance))
    buckets = buckets_of(distances, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
    for relative, bucket in zip(distances, buckets, strict=True):
        distance = abs(relative) if bidirectional else max(-relative, 0)
        exact = side // 2
        if distance < exact:
            expected = distance
        else:
            position = math.log(distance / exact) / math.log(max_distance / exact) * (side - exact)
            if abs(position - round(position)) < 1e-5 and distance < max_distance:
                continue
            expected = min(exact + int(position + 1e-9), side - 1)
        expected += side if bidirectional and relative > 0 else 0
        assert bucket == expected


def test_relative_bias_looks_up_the_table_per_head():
    table = jax.random.normal(jax.random.key(0), (32, 3))
    queries, keys = jnp.arange(4, 9), jnp.arange(7)
    bias = relative_bias(table, queries, keys, bidirectional=True)
    buckets = relative_position_buckets(keys[None] - queries[:, None], bidirectional=True)
    assert bias.shape == (3, 5, 7)
    np.testing.assert_array_equal(bias, np.moveaxis(np.asarray(table)[np.asarray(buckets)], -1, 0))
    batched = relative_bias(table, queries[None], keys[None], bidirectional=True)
    np.testing.assert_array_equal(batched[0], bias)


def test_relative_bias_gradient_counts_each_bucket():
    table = jnp.zeros((8, 2))
    at, kwargs = jnp.arange(6), {"bidirectional": False, "max_distance": 16}
    grad = jax.grad(lambda t: relative_bias(t, at, at, **kwargs).sum())(table)
    buckets = relative_position_buckets(at[None] - at[:, None], num_buckets=8, **kwargs)
    np.testing.assert_array_equal(grad[:, 0], np.bincount(np.asarray(buckets).ravel(), minlength=8))


@pytest.mark.parametrize("kwargs", [{"num_buckets": 1}, {"num_buckets": 2, "bidirectional": True}, {"max_distance": 16}])
def test_buckets_that_cannot_be_are_refused(kwargs):
    with pytest.raises(ConfigError, match="relative_"):
        relative_position_buckets(jnp.arange(3), **{"bidirectional": False, **kwargs})


def test_sinusoids_interleave_sine_and_cosine():
    table = sinusoidal_positions(jnp.arange(50), 12)
    for position in (0, 1, 49):
        for i in range(6):
            angle = position / 10_000 ** (2 * i / 12)
            np.testing.assert_allclose(table[position, 2 * i], math.sin(angle), atol=1e-5)
            np.testing.assert_allclose(table[position, 2 * i + 1], math.cos(angle), atol=1e-5)
    assert sinusoidal_positions(jnp.zeros((2, 3), jnp.int32), 4).shape == (2, 3, 4)
    with pytest.raises(ConfigError, match="even"):
        sinusoidal_positions(jnp.arange(3), 5)


def torch_bicubic_pixel(image, y, x, new):
    """One output pixel of torch's bicubic resize, written from its definition: four taps a side, a = -0.75, clamped edges."""

    def taps(old, size, index):
        centre = (index + 0.5) * old / size - 0.5
        base = math.floor(centre)
        t, a = centre - base, -0.75
        far = lambda d: a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a  # noqa: E731
        near = lambda d: (a + 2) * d**3 - (a + 3) * d**2 + 1  # noqa: E731
        coefficients = [far(t + 1), near(t), near(1 - t), far(2 - t)]
        return [(min(max(base - 1 + i, 0), old - 1), c) for i, c in enumerate(coefficients)]

    rows, columns = taps(image.shape[0], new[0], y), taps(image.shape[1], new[1], x)
    return sum(wy * wx * image[iy, ix] for iy, wy in rows for ix, wx in columns)


@pytest.mark.parametrize("new", [(7, 5), (2, 3), (8, 8)])
def test_bicubic_positions_equal_torchs_definition(new):
    table = np.random.default_rng(0).normal(size=(1 + 4 * 3, 2)).astype(np.float32)
    out = np.asarray(interpolate_positions(jnp.asarray(table), (4, 3), new, class_tokens=1))
    grid = table[1:].reshape(4, 3, 2)
    np.testing.assert_array_equal(out[0], table[0])
    for y in range(new[0]):
        for x in range(new[1]):
            np.testing.assert_allclose(out[1 + y * new[1] + x], torch_bicubic_pixel(grid, y, x, new), atol=1e-5)


def test_linear_positions_equal_jax_image():
    table = jax.random.normal(jax.random.key(0), (12, 3))
    out = interpolate_positions(table, (4, 3), (9, 7), method="linear")
    expected = jax.image.resize(table.reshape(4, 3, 3), (9, 7, 3), "linear", antialias=False)
    np.testing.assert_allclose(out, expected.reshape(-1, 3), atol=1e-5)


def test_the_same_grid_is_returned_bit_for_bit_and_weights_sum_to_one():
    table = jax.random.normal(jax.random.key(0), (10, 3))
    assert interpolate_positions(table, (3, 3), (3, 3), class_tokens=1) is table
    for method in ("bicubic", "linear"):
        np.testing.assert_allclose(resize_weights(5, 11, method).sum(1), 1, atol=1e-12)


def test_a_table_of_another_size_or_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="1 \\+ 3 x 3 = 10 rows"):
        interpolate_positions(jnp.zeros((9, 2)), (3, 3), (4, 4), class_tokens=1)
    with pytest.raises(ConfigError, match="Did you mean 'bicubic'"):
        interpolate_positions(jnp.zeros((9, 2)), (3, 3), (4, 4), method="cubic")
