import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.compress.obs import factor, obs_sweep
from sparsejax.plugs import ConfigError


def inputs(seed, tokens, features, correlation=0.4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tokens, features)) @ (np.eye(features) + correlation * rng.normal(size=(features, features)))


class Rounding:
    """GPTQ's decision: the grid of step `step[out]`, found anew for every group of rows."""

    def __init__(self, group, step=None):
        self.group, self.step = group, step

    def __call__(self, rows, pivots, first):
        step = np.abs(rows).max(0) / 7 if self.step is None else self.step
        return lambda i, row: np.clip(np.round(row / step), -7, 7) * step


@given(st.integers(0, 10**6), st.integers(1, 40))
def test_the_factor_is_that_of_the_damped_inverse(seed, features):
    x = inputs(seed, 60, features)
    h = x.T @ x / len(x)
    inverse = factor(h, 0.01)
    damped = h + 0.01 * np.mean(np.diag(h)) * np.eye(features)
    np.testing.assert_allclose(inverse.upper.T @ inverse.upper @ damped, np.eye(features), atol=1e-7)
    assert (np.triu(inverse.upper) == inverse.upper).all() and not inverse.dead.any() and inverse.damping == 0.01


def test_dead_inputs_lose_their_weights_and_do_not_spoil_the_factor():
    x = inputs(0, 50, 6)
    x[:, 2] = 0
    inverse = factor(x.T @ x)
    assert inverse.dead.tolist() == [False, False, True, False, False, False] and np.isfinite(inverse.upper).all()
    swept = obs_sweep(np.ones((6, 3)), inverse, Rounding(6, np.full(3, 1e-9)))
    assert not swept[2].any()


def test_damping_grows_tenfold_until_an_indefinite_hessian_can_be_factored():
    h = np.diag([1.0, 1.0, -0.5])
    assert factor(h, 0.01).damping == pytest.approx(10.0)
    with pytest.raises(ConfigError, match="not finite"):
        factor(np.full((2, 2), np.nan))


@pytest.mark.parametrize("group", [1, 4, 12, 30, 64])
@pytest.mark.parametrize("features", [30, 64])
def test_the_size_of_blocks_changes_speed_alone(group, features):
    rng = np.random.default_rng(features)
    x, w = inputs(1, 200, features), rng.normal(size=(features, 5))
    inverse = factor(x.T @ x / len(x))
    swept = [obs_sweep(w, inverse, Rounding(group), block) for block in (1, 16, 32, 128)]
    for other in swept[1:]:
        np.testing.assert_allclose(other, swept[0], atol=1e-10)


@given(st.integers(0, 10**6))
def test_white_inputs_leave_nothing_to_make_up_for(seed):
    w = np.random.default_rng(seed).normal(size=(20, 4))
    step = np.abs(w).max(0) / 7
    np.testing.assert_array_equal(obs_sweep(w, factor(3 * np.eye(20)), Rounding(20)), np.round(w / step) * step)


def test_the_golden_example_of_gptq():
    """Four inputs, two outputs, codes -7 to 7 of step .45, damping .01: the vector of the method's card."""
    h = np.array([[23, 27, -2, -4], [27, 35, 5, 0], [-2, 5, 30, 22], [-4, 0, 22, 17]]) / 3
    w = np.array([[1, -0.75, -1.25, -0.625], [-0.25, 1, -0.125, -1.25]]).T
    inverse = factor(h, 0.01)
    np.testing.assert_allclose(np.diag(inverse.upper), [1.51335, 0.35336, 1.16121, 0.41688], atol=1e-5)
    swept = obs_sweep(w, inverse, Rounding(4, np.full(2, 0.45)))
    np.testing.assert_allclose(swept / 0.45, np.array([[2, -1, -4, 0], [-1, 3, -1, -2]]).T, atol=1e-12)

    def loss(q):
        return np.trace((q - w).T @ (h + 0.0875 * np.eye(4)) @ (q - w))

    assert loss(swept) == pytest.approx(0.709203125)
    assert loss(np.round(w / 0.45) * 0.45) == pytest.approx(1.473640625)
