"""Learned orthogonal matrices stay orthogonal and lower what they are learned for; the objectives against their cards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from sparsejax.compress.basis import eigenbasis, hadamard_basis, random_basis
from sparsejax.compress.orthogonal import Cayley, Qr, learn, nearest_orthogonal
from sparsejax.compress.rotation_objectives import cross_entropy, kl_top, kurtosis, kurtosis_gap, log_qsur, whip
from sparsejax.plugs import ConfigError

WAYS = {"cayley": Cayley(), "cayley adam": Cayley(0.9, 0.99), "qr": Qr()}
RATES = {"cayley": 1.5, "cayley adam": 0.2, "qr": 0.02}


def published_step(x, v, g, rate, momentum):
    """Cayley SGD as SpinQuant's code has it, in float64."""
    v = momentum * v - g.T
    mx = v @ x
    w_hat = mx - 0.5 * x.T @ (x @ mx)
    w = w_hat - w_hat.T
    alpha = min(1 / (np.abs(w).sum(0).max() + 1e-8), rate)
    y = x.T + alpha * v
    for _ in range(5):
        y = x.T + alpha * w @ (0.5 * (x.T + y))
    return y.T, w @ x.T


def test_cayley_sgd_is_the_published_step_and_stays_on_the_manifold():
    rng, way = np.random.default_rng(0), Cayley(momentum=0.5)
    x, v = random_basis(64, 0), np.zeros((64, 64))
    held, memory = way.initial(jnp.asarray(x[None], jnp.float32))
    step = jax.jit(way.step)
    for number in range(100):
        g = rng.normal(size=(64, 64))
        if number < 3:
            x, v = published_step(x, v, g, 1.5, 0.5)
        held, memory = step(held, memory, jnp.asarray(g[None], jnp.float32), jnp.float32(1.5))
        if number < 3:
            np.testing.assert_allclose(held[0], x, atol=2e-5)
            np.testing.assert_allclose(memory.first[0], v, rtol=1e-3, atol=2e-2)
    np.testing.assert_allclose(held[0].T @ held[0], np.eye(64), atol=2e-6)  # the card: 1e-5


@pytest.mark.parametrize("name", WAYS)
def test_a_planted_rotation_is_found_by_every_parametrisation(name):
    """Least squares over rotations (Procrustes), two matrices at once, and a free parameter beside them."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    planted = np.stack([random_basis(8, seed) for seed in (3, 4)])
    start = nearest_orthogonal(planted + 0.15 * rng.normal(size=(2, 8, 8)))

    def loss(rotations, free, x):
        return jnp.mean(jnp.square(x @ rotations["r"] * jnp.exp(free["scale"]) - 1.5 * x @ planted.astype(np.float32)))

    found = learn(loss, {"r": start}, [x[:32], x[32:]], WAYS[name], rate=RATES[name], steps=150,
                  free={"scale": np.zeros(())}, free_rate=0.02)  # fmt: skip
    assert found.after < 1e-2 < found.before and found.path[-1] < found.path[0] and len(found.path) == 150
    np.testing.assert_allclose(found.rotations["r"], planted, atol=0.1)
    np.testing.assert_allclose(np.exp(found.free["scale"]), 1.5, atol=0.05)
    np.testing.assert_allclose(found.rotations["r"].mT @ found.rotations["r"], np.eye(8)[None].repeat(2, 0), atol=1e-12)


def test_where_nothing_is_gained_the_start_is_kept():
    start = random_basis(6, 0)
    here = [start.astype(np.float32)]
    found = learn(lambda r, f, x: jnp.mean(jnp.abs(r["r"] - x)), {"r": start}, here, Qr(), rate=1.0, steps=3)
    assert found.after == found.before
    np.testing.assert_allclose(found.rotations["r"], start, atol=1e-6)
    with pytest.raises(ConfigError, match="is no number at the start"):
        learn(lambda r, f, x: jnp.sum(r["r"]) * x, {"r": start}, [np.float32(np.nan)], Qr(), rate=1.0, steps=1)
    with pytest.raises(ConfigError, match="there must be one at least"):
        learn(lambda r, f, x: jnp.sum(r["r"]), {"r": start}, [], Qr(), rate=1.0, steps=1)


def test_the_qr_parametrisation_starts_where_it_is_told_and_ignores_length():
    start = np.stack([random_basis(8, 0), hadamard_basis(8, 1)])
    held, _ = Qr().initial(jnp.asarray(start, jnp.float32))
    for scale in (1.0, 7.0):
        np.testing.assert_allclose(Qr().rotation(scale * held), start, atol=1e-6)
    np.testing.assert_allclose(nearest_orthogonal(start[0] + 1e-3 * np.eye(8)), start[0], atol=2e-3)


def test_kurtosis_of_known_distributions():
    rng = np.random.default_rng(0)
    for draw, expected in ((rng.uniform(size=10**6), 1.8), (rng.normal(size=10**6), 3.0), (rng.laplace(size=10**6), 6.0)):
        x = draw.astype(np.float32)
        assert abs(float(kurtosis(x)) - expected) < (0.02 if expected < 6 else 0.06)
    assert abs(float(jax.grad(lambda scale: kurtosis_gap(scale * x[:4096]))(2.0))) < 1e-4
    np.testing.assert_allclose(whip(np.array([0.0, 1.0, -2.0], np.float32)), (1 + np.exp(-1) + np.exp(-2)) / 3, rtol=1e-6)


@given(st.integers(0, 10**6), st.sampled_from([2, 9]))
@settings(max_examples=6, deadline=None)
def test_kl_top_is_the_divergence_of_the_largest_logits(seed, k):
    t, s = np.random.default_rng(seed).normal(size=(2, 3, 9)).astype(np.float32) * 3
    index = np.argsort(-t, -1)[:, :k]
    pick = lambda a: np.take_along_axis(a, index, -1)  # noqa: E731
    p, q = (log_softmax(pick(a).astype(np.float64), -1) for a in (t, s))
    np.testing.assert_allclose(kl_top(pick(t), index, s), np.mean(np.sum(np.exp(p) * (p - q), -1)), rtol=1e-4, atol=1e-6)
    shifted = s.copy()
    np.put_along_axis(shifted, index, pick(t) + 5, -1)
    assert abs(float(kl_top(pick(t), index, shifted))) < 1e-5  # equal up to a constant, whatever the others are
    if k == 9:
        p, q = (log_softmax(a.astype(np.float64), -1) for a in (t, s))
        np.testing.assert_allclose(kl_top(pick(t), index, s), np.mean(np.sum(np.exp(p) * (p - q), -1)), rtol=1e-4, atol=1e-6)


def test_cross_entropy_scores_each_token_given_those_before():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(2, 4, 7)).astype(np.float32), rng.integers(0, 7, (2, 4))
    expected = -np.mean([log_softmax(logits[b, t])[tokens[b, t + 1]] for b in range(2) for t in range(3)])
    np.testing.assert_allclose(cross_entropy(logits, tokens), expected, rtol=1e-5)


def test_the_space_that_a_tensor_fills():
    """Golden upper bound at 64 channels; a rotation's best is to make variances equal, which eigenvectors and Hadamard do."""
    assert round(log_qsur(3.0 * np.eye(64)), 2) == -89.29
    c = np.diag(np.exp(np.random.default_rng(0).normal(size=64) * 2))
    turn = random_basis(64, 1)
    c = turn.T @ c @ turn
    best = eigenbasis(c) @ hadamard_basis(64)
    np.testing.assert_allclose(np.diag(best.T @ c @ best), np.trace(c) / 64)
    bound = log_qsur(best.T @ c @ best)
    assert log_qsur(c) < bound < log_qsur(np.eye(64))
    assert log_qsur(hadamard_basis(64, 2).T @ c @ hadamard_basis(64, 2)) < bound
