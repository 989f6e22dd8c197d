"""Fits of the Sparsing Law recover planted curves, and their intervals hold them."""

import numpy as np
import pytest

from sparsejax.evaluate.sparsing_law import activation_ratio, fit_law, fit_width_depth
from sparsejax.plugs import ConfigError

TOKENS = np.geomspace(0.5e9, 300e9, 24)
PLANTED = [
    ("decreasing", {"a": 0.101, "b": -0.0151, "c": 3.20, "A0": 0.0614}),
    ("decreasing", {"a": 0.449, "b": -3.05, "c": 0.286, "A0": 0.0674}),
    ("decreasing", {"a": 1.01, "b": -3.49, "c": 0.00797, "A0": 0.0721}),
    ("increasing", {"a": 0.479, "c": 0.05, "A0": 0.409}),
    ("increasing", {"a": 1.03, "c": 0.02, "A0": 0.385}),
]


@pytest.mark.parametrize(("law", "planted"), PLANTED)
def test_noise_free_points_give_the_planted_function_values(law, planted):
    fit = fit_law(law, TOKENS, activation_ratio(law, planted, TOKENS), resamples=2)
    np.testing.assert_allclose(fit.curve, activation_ratio(law, planted, fit.grid), atol=1e-5)
    np.testing.assert_allclose(activation_ratio(law, fit.parameters, fit.grid), fit.curve, atol=1e-9)
    assert fit.residual < 1e-6


@pytest.mark.parametrize(("law", "planted"), PLANTED[::3])
def test_the_band_of_noisy_points_holds_the_planted_curve(law, planted):
    noise = np.random.default_rng(0).normal(0, 0.002, len(TOKENS))
    fit = fit_law(law, TOKENS, activation_ratio(law, planted, TOKENS) + noise, resamples=30)
    inside = activation_ratio(law, planted, fit.grid)
    assert np.mean((inside >= fit.band_low - 1e-3) & (inside <= fit.band_high + 1e-3)) > 0.8
    assert fit.low <= fit.parameters["A0"] + 1e-3 and fit.residual < 0.004


def test_the_line_over_width_and_depth_is_recovered_with_its_interval():
    x = [16.0, 32, 64, 100]
    fit = fit_width_depth(x, [0.1 + 0.002 * v for v in x])
    assert fit.slope == pytest.approx(0.002) and fit.intercept == pytest.approx(0.1)
    assert fit.low == pytest.approx(0.002) and fit.high == pytest.approx(0.002)


def test_points_that_cannot_be_fitted_are_refused():
    with pytest.raises(ConfigError, match="at least 6"):
        fit_law("increasing", TOKENS[:5], np.full(5, 0.3))
    with pytest.raises(ConfigError, match="must be positive"):
        fit_law("increasing", TOKENS - TOKENS[0], np.full(24, 0.3))
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]"):
        fit_law("increasing", TOKENS, np.full(24, 1.3))
    with pytest.raises(ConfigError, match="law = 'rising': allowed are"):
        fit_law("rising", TOKENS, np.full(24, 0.3))
    with pytest.raises(ConfigError, match="at least 3 different"):
        fit_width_depth([1, 1, 2], [0.1, 0.2, 0.3])
