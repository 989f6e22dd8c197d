"""The delta activation layer: telescoping, zeros of a still stream, theta's gradient, drift and packed weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.methods.quant.qat import Int8Weight
from sparsejax.methods.sparsity.delta import DeltaLinear, quantize
from sparsejax.plugs import ConfigError

THETA = jnp.float32(0.1)


def stream(frames=12, features=8, rho=0.9, seed=0):
    """An AR(1) stream of unit variance [T, 2, in]."""
    rng = np.random.default_rng(seed)
    x = [rng.standard_normal((2, features))]
    for _ in range(frames - 1):
        x.append(rho * x[-1] + (1 - rho**2) ** 0.5 * rng.standard_normal((2, features)))
    return jnp.asarray(np.stack(x), jnp.float32)


W = jax.random.normal(jax.random.key(0), (8, 5))


@settings(max_examples=6, deadline=None)
@given(st.floats(0.01, 2.0), st.integers(0, 99), st.sampled_from([0, 3]))
def test_the_accumulated_output_is_that_of_the_quantized_input(theta, seed, resync):
    x = stream(seed=seed)
    found = DeltaLinear(resync)(x, W, jnp.float32(theta))
    expected = np.round(np.asarray(x) / np.float32(theta)) * np.float32(theta) @ np.asarray(W)
    np.testing.assert_allclose(found.outputs, expected, rtol=1e-4, atol=1e-4)


def test_telescoping_is_exact_in_float64():
    with jax.enable_x64(True):
        x, w = jnp.asarray(np.asarray(stream(50)), jnp.float64), jnp.asarray(np.asarray(W), jnp.float64)
        found = DeltaLinear()(x, w, jnp.float64(0.1))
        assert float(jnp.abs(found.outputs[-1] - quantize(x[-1], jnp.float64(0.1)) @ w).max()) < 1e-13


def test_a_small_theta_is_the_dense_map_and_a_still_stream_is_all_zeros_after_its_first_frame():
    x = stream()
    np.testing.assert_allclose(DeltaLinear()(x, W, jnp.float32(1e-5)).outputs, x @ W, atol=1e-3)
    still = DeltaLinear()(jnp.broadcast_to(x[0], x.shape), W, THETA)
    assert (still.zeros[1:] == 1).all() and still.zeros[0] < 1 and (still.change[1:] == 0).all()


def test_slow_streams_and_large_thetas_have_more_zeros():
    by_theta = [float(DeltaLinear()(stream(60), W, jnp.float32(t)).zeros[1:].mean()) for t in (0.02, 0.1, 0.5, 2.0)]
    assert by_theta == sorted(by_theta) and by_theta[-1] > by_theta[0] + 0.3
    slow, white = (float(DeltaLinear()(stream(60, rho=rho), W, jnp.float32(0.5)).zeros[1:].mean()) for rho in (0.99, 0.0))
    assert slow > 2 * white


def test_a_stream_may_be_cut_and_gone_on_with():
    x, layer = stream(), DeltaLinear()
    whole, first = layer(x, W, THETA), layer(x[:5], W, THETA)
    second = layer(x[5:], W, THETA, first.memory)
    np.testing.assert_array_equal(jnp.concatenate([first.outputs, second.outputs]), whole.outputs)
    np.testing.assert_array_equal(second.zeros, whole.zeros[5:])


def test_gradients_go_straight_through_to_x_and_the_penalty_makes_theta_larger():
    x = stream()
    dx, dw, dtheta = jax.grad(lambda x, w, t: jnp.sum(DeltaLinear()(x, w, t).outputs ** 2), argnums=(0, 1, 2))(x, W, THETA)
    quantized = jnp.round(x / THETA) * THETA
    np.testing.assert_allclose(dx, 2 * (quantized @ W) @ W.T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dw, 2 * jnp.einsum("tbi,tbo->io", quantized, quantized @ W), rtol=1e-3, atol=1e-2)
    assert dtheta.shape == () and np.isfinite(dtheta)
    penalty = jax.grad(lambda t: jnp.mean(DeltaLinear()(x, W, t).change))(THETA)
    assert penalty < 0  # descending makes theta larger
    assert jax.grad(lambda t: jnp.mean(DeltaLinear()(x, W, t).change))(-THETA) > 0
    per_channel = jax.grad(lambda t: jnp.mean(DeltaLinear()(x, W, t).change))(jnp.full(8, 0.1))
    assert per_channel.shape == (8,) and (per_channel < 0).all()


def test_weights_may_be_packed():
    packed = Int8Weight().encode(W)
    found, expected = (DeltaLinear()(stream(), w, THETA).outputs for w in (packed, packed.dequantize()))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_negative_interval_is_refused():
    with pytest.raises(ConfigError, match="resync"):
        DeltaLinear(-1)
