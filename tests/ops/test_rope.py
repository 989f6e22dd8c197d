import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.ops.rope import (
    LinearScaling,
    Llama3Scaling,
    NoScaling,
    apply_rope,
    inverse_frequencies,
    parse_scaling,
    rope,
    rope_tables,
)
from sparsejax.plugs import ConfigError


def oracle(x, positions, theta, fraction):
    """Rotation by 2 x 2 matrices in float64, one pair (i, i + r / 2) at a time."""
    out = np.asarray(x, np.float64).copy()
    size = int(x.shape[-1] * fraction)
    for i in range(size // 2):
        angle = np.asarray(positions, np.float64)[..., None] * theta ** (-2 * i / size)
        a, b = x[..., i].astype(np.float64), x[..., i + size // 2].astype(np.float64)
        out[..., i] = a * np.cos(angle) - b * np.sin(angle)
        out[..., i + size // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


@settings(max_examples=10, deadline=None)
@given(
    half=st.sampled_from([1, 4, 5]),
    fraction=st.sampled_from([1.0, 0.5]),
    theta=st.sampled_from([1e2, 1e4]),
    seed=st.integers(0, 99),
)
def test_rope_equals_rotation_matrices(half, fraction, theta, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 5, 3, 4 * half)).astype(np.float32)
    positions = rng.integers(0, 200, (2, 5)).astype(np.int32)
    actual = jax.jit(partial(rope, theta=theta, fraction=fraction))(x, positions)
    np.testing.assert_allclose(actual, oracle(x, positions, theta, fraction), atol=1e-4)


@pytest.mark.parametrize("scaling", ["none", "linear:4", "llama3:8,1,4,32"])
def test_dot_products_depend_on_the_distance_alone(scaling):
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 2, 16)) for i in range(2))

    def product(at, other):
        rotate = lambda x, p: rope(x, jnp.full((1, 1), p), theta=1e4, scaling=scaling)  # noqa: E731
        return (rotate(q, at) * rotate(k, other)).sum(-1)

    np.testing.assert_allclose(product(3, 1), product(103, 101), atol=1e-4)
    assert not np.allclose(product(3, 1), product(3, 2), atol=1e-3)


def test_only_the_leading_fraction_is_rotated():
    x = jax.random.normal(jax.random.key(0), (1, 4, 1, 16))
    out = rope(x, jnp.arange(4)[None] + 7, theta=1e4, fraction=0.25)
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    assert not np.allclose(out[..., :4], x[..., :4])


def test_position_zero_changes_nothing_and_norms_are_kept():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    out = rope(x, jnp.array([[0, 5, 900]]), theta=1e4)
    np.testing.assert_array_equal(out[:, 0], x[:, 0])
    np.testing.assert_allclose(jnp.linalg.norm(out, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_tables_of_one_row_serve_the_whole_batch():
    x = jax.random.normal(jax.random.key(0), (3, 4, 2, 8))
    cos, sin = rope_tables(jnp.arange(4)[None], 8, theta=1e4)
    np.testing.assert_array_equal(apply_rope(x, cos, sin), rope(x, jnp.tile(jnp.arange(4)[None], (3, 1)), theta=1e4))


def test_low_precision_inputs_are_rotated_in_float32():
    x = jax.random.normal(jax.random.key(0), (1, 4, 1, 8), jnp.bfloat16)
    positions = jnp.array([[1, 257, 1001, 4003]])  # 257 and up are not bfloat16 numbers
    out = rope(x, positions, theta=1e4)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, rope(x.astype(jnp.float32), positions, theta=1e4).astype(jnp.bfloat16))


def test_llama3_frequencies_equal_the_published_rule_case_by_case():
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    expected = []
    for i in range(64):
        frequency = 500_000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            expected.append(frequency)
        elif wavelength > original / low:
            expected.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    actual = inverse_frequencies(128, theta=500_000.0, scaling="llama3:8,1,4,8192")
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    assert len(set(np.round(np.divide(actual, inverse_frequencies(128, theta=500_000.0)), 6))) > 3  # all three cases occur


def test_linear_scaling_equals_dividing_positions():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    scaled = rope(x, jnp.array([[0, 4, 8]]), theta=1e4, scaling="linear:4")
    np.testing.assert_allclose(scaled, rope(x, jnp.array([[0, 1, 2]]), theta=1e4), atol=1e-6)


def test_scaling_strings_become_frozen_specs():
    assert parse_scaling("none") == NoScaling()
    assert parse_scaling("linear:2") == LinearScaling(2.0)
    assert parse_scaling("llama3:32,1,4,8192") == Llama3Scaling(32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("yarn:4", "llama3"),
        ("lama3:8,1,4,8192", "Did you mean 'llama3'"),
        ("linear", "needs factor"),
        ("linear:.5", "at least 1"),
        ("linear:x", "expected float"),
        ("llama3:8,4,1,8192", "low < high"),
        ("llama3:8,1,4", "needs original_length"),
        ("llama3:8,1,4,0", "positive"),
    ],
)
def test_a_wrong_scaling_is_refused_by_name(text, told):
    with pytest.raises(ConfigError, match=told):
        parse_scaling(text, "model.positions.rope.scaling")


@pytest.mark.parametrize(("head_dim", "fraction"), [(8, 0.0), (8, 1.5), (7, 1.0), (8, 0.2), (12, 0.25)])
def test_a_fraction_without_an_even_number_of_features_is_refused(head_dim, fraction):
    with pytest.raises(ConfigError, match="rope.fraction"):
        inverse_frequencies(head_dim, theta=1e4, fraction=fraction)
