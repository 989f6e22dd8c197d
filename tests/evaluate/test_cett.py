"""CETT against the card's float64 oracle and its identities."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.evaluate.cett import CettCurve, cett, cett_curve, neuron_norms


def oracle(h, kernel, threshold):
    """(CETT, sparsity) in float64."""
    tail = np.abs(h) * np.linalg.norm(kernel, axis=1) <= threshold
    whole = np.linalg.norm(h @ kernel, axis=-1)
    part = np.linalg.norm((h * tail) @ kernel, axis=-1)
    return float(np.mean(np.where(whole > 0, part / np.maximum(whole, 1e-30), 0))), float(tail.mean())


def drawn(seed, tokens=20, hidden=24, width=8, relu=False):
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((tokens, hidden))
    return (np.maximum(h, 0) if relu else h).astype(np.float32), rng.standard_normal((hidden, width)).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), relu=st.booleans(), c=st.floats(0, 1))
def test_the_threshold_for_a_bound_is_the_largest_of_the_grid_whose_error_is_within_it(seed, relu, c):
    h, kernel = drawn(seed, relu=relu)
    curve = cett_curve(jnp.asarray(h), jnp.asarray(kernel), 16)
    wide = h.astype(np.float64), kernel.astype(np.float64)
    for threshold, error, sparsity in zip(*curve, strict=True):
        # One ulp up: an entry that equals the threshold in float32 may exceed it in float64.
        expected, share = oracle(*wide, float(threshold) * (1 + 1e-6))
        assert error == pytest.approx(expected, abs=1e-5) and sparsity == pytest.approx(share, abs=1e-9)
    threshold, sparsity = curve.at(c)
    below = np.flatnonzero(curve.cett <= c)[-1]
    above = min(below + 1, len(curve.cett) - 1)
    assert curve.threshold[below] <= threshold <= curve.threshold[above]
    assert curve.sparsity[below] <= sparsity <= curve.sparsity[above]


@pytest.mark.parametrize("relu", [False, True])
def test_a_bound_of_zero_drops_exact_zeros_alone_and_one_of_one_drops_everything(relu):
    h, kernel = drawn(3, relu=relu)
    curve = cett_curve(jnp.asarray(h), jnp.asarray(kernel))
    assert curve.at(0.0) == (0.0, pytest.approx(np.mean(h == 0)))
    assert curve.at(1.0)[1] == 1.0 and curve.cett[-1] == 1.0
    assert float(cett(jnp.asarray(h), jnp.asarray(kernel), jnp.asarray([1e9]))[0]) == pytest.approx(1, abs=1e-6)


def test_orthonormal_rows_have_the_closed_form_and_are_monotone():
    h, _ = drawn(5, tokens=64, hidden=16)
    kernel = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0].astype(np.float32)
    curve = cett_curve(jnp.asarray(h), jnp.asarray(kernel), 12)
    assert curve.decreases == 0
    for threshold, error in zip(curve.threshold[1:-1], curve.cett[1:-1], strict=True):
        tail = np.where(np.abs(h) <= threshold * (1 + 1e-6), h, 0).astype(np.float64)
        expected = np.mean(np.linalg.norm(tail, axis=1) / np.linalg.norm(h.astype(np.float64), axis=1))
        assert error == pytest.approx(expected, abs=2e-5)


def test_rescaling_neurons_changes_nothing():
    h, kernel = drawn(7)
    scale = np.exp2(np.random.default_rng(2).integers(-3, 4, 24)).astype(np.float32)  # exact in float32
    one = cett_curve(jnp.asarray(h), jnp.asarray(kernel))
    other = cett_curve(jnp.asarray(h * scale), jnp.asarray(kernel / scale[:, None]))
    for left, right in zip(one, other, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    np.testing.assert_allclose(neuron_norms(jnp.asarray(kernel)), np.linalg.norm(kernel, axis=1), rtol=1e-6)


def test_the_largest_threshold_counts_where_the_error_falls_again_and_silent_tokens_count_nothing():
    curve = CettCurve(np.array([0.0, 1, 2, 3]), np.array([0, 0.5, 0.3, 1.0]), np.array([0.1, 0.4, 0.6, 1]))
    assert curve.decreases == 1 and curve.at(0.3) == (2.0, pytest.approx(0.6))
    assert curve.at(0.65) == (pytest.approx(2.5), pytest.approx(0.8))
    h, kernel = drawn(0)
    silent = np.concatenate([h, np.zeros_like(h)])
    both = [np.asarray(cett(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray([0.7])))[0] for x in (h, silent)]
    assert both[1] == pytest.approx(both[0] / 2)
    dead = cett_curve(jnp.zeros((3, 24)), jnp.asarray(kernel))
    assert dead.at(0.0) == (0.0, 1.0) and dead.at(1.0) == (0.0, 1.0)
