"""How the activation ratio A = 1 - sparsity moves with the training tokens D ("Sparsing Law", 2024, arXiv 2411.02335).

    decreasing, as ReLU's    A(D) = exp(-c D^a + b) + A0
    increasing, as SiLU's    A(D) = A0 - c / D^a
    width and depth          A = slope * d_model / num_layers + intercept, below a bottleneck of about 114

Intervals are bootstrapped: residuals, scaled up for the parameters that they have paid for, are drawn in blocks, since those of
one run follow each other, and fitted anew.
a, b and c are strongly correlated (the paper's own fit at .1B is nearly degenerate), so curves are compared, not coefficients.
Published: D in billions of tokens; A0 .061 to .078 for ReLU and .38 to .41 for SiLU; the first few billions were left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from sparsejax.plugs import check, check_choice

LAWS = ("decreasing", "increasing")
BILLION = 1e9
RESAMPLES = 200
EXPONENTS = (0.1, 0.3, 0.6, 1.0, 1.5)
MOST_STEPS = 2000  # of least squares from a start; 60 for a resampled fit, which starts from the fit itself


@dataclass(frozen=True)
class LawFit:
    """A fitted curve.

    Fields:
      law: of `LAWS`.
      parameters: a, c, A0, and b where decreasing; D in billions of tokens.
      low, high: of A0, 90 % of the bootstrap.
      residual: root mean square of A less the curve.
      tokens, ratio: what was fitted. grid: tokens at which `curve` and its 90 % band `band_low`, `band_high` are given.
    """

    law: str
    parameters: dict[str, float]
    low: float
    high: float
    residual: float
    tokens: np.ndarray
    ratio: np.ndarray
    grid: np.ndarray
    curve: np.ndarray
    band_low: np.ndarray
    band_high: np.ndarray


def activation_ratio(law: str, parameters: dict[str, float], tokens: np.ndarray) -> np.ndarray:
    """A at D = `tokens`."""
    power = (np.asarray(tokens, np.float64) / BILLION) ** parameters["a"]
    if law == "increasing":
        return parameters["A0"] - parameters["c"] / power
    return np.exp(-parameters["c"] * power + parameters["b"]) + parameters["A0"]


def fit_law(law: str, tokens: Sequence[float], ratio: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> LawFit:
    """Fit a law to activation ratios at increasing numbers of training tokens.

    Raises:
      ConfigError: an unknown law, fewer than 6 points, tokens or ratios out of range.
    """
    check_choice("law", law, LAWS)
    x, y = np.asarray(tokens, np.float64), np.asarray(ratio, np.float64)
    check(len(x) == len(y) >= 6, "law: points", len(x), "at least 6 are needed for its parameters and an interval")
    check(x.min() > 0, "law: tokens", float(x.min()), "must be positive")
    check(y.min() >= 0 and y.max() <= 1, "law: ratio", (float(y.min()), float(y.max())), "must lie in [0, 1]")
    scale = float(x.max())
    best = _best(law, x / scale, y)
    fitted = _curve(law, x / scale, best)
    grid = np.geomspace(x.min(), x.max(), 60)
    residuals = (y - fitted) * math.sqrt(len(x) / (len(x) - len(best)))
    rng, draws = np.random.default_rng(seed), []
    for _ in range(resamples):
        again = _refit(law, x / scale, fitted + _blocks(residuals, rng), best, 60)
        draws.append((again[2], _curve(law, grid / scale, again)))
    band = np.percentile([curve for _, curve in draws], (5, 95), axis=0)
    low, high = np.percentile([limit for limit, _ in draws], (5, 95))
    return LawFit(
        law=law,
        parameters=_parameters(law, best, scale),
        low=float(low),
        high=float(high),
        residual=float(np.sqrt(np.mean((y - fitted) ** 2))),
        tokens=x,
        ratio=y,
        grid=grid,
        curve=_curve(law, grid / scale, best),
        band_low=band[0],
        band_high=band[1],
    )


@dataclass(frozen=True)
class LineFit:
    """A = slope * d_model / num_layers + intercept over runs; low, high: of the slope, 90 % of a bootstrap over runs."""

    slope: float
    intercept: float
    low: float
    high: float


def fit_width_depth(
    width_per_layer: Sequence[float], ratio: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> LineFit:
    """The line through runs of other shapes.

    Raises:
      ConfigError: fewer than 3 different shapes.
    """
    x, y = np.asarray(width_per_layer, np.float64), np.asarray(ratio, np.float64)
    check(len(np.unique(x)) >= 3, "width and depth", sorted(set(x.tolist())), "at least 3 different ratios are needed")
    slope, intercept = np.polyfit(x, y, 1)
    rng = np.random.default_rng(seed)
    slopes: list[float] = []
    while len(slopes) < resamples:
        chosen = rng.integers(0, len(x), len(x))
        if len(np.unique(x[chosen])) > 1:
            slopes.append(float(np.polyfit(x[chosen], y[chosen], 1)[0]))
    low, high = np.percentile(slopes, (5, 95))
    return LineFit(float(slope), float(intercept), float(low), float(high))


def _curve(law: str, x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of tokens over their largest: values are log a, log c, A0 and, where decreasing, b."""
    power, factor = math.exp(values[0]), math.exp(values[1])
    if law == "increasing":
        return values[2] - factor * x**-power
    return np.exp(np.minimum(values[3] - factor * x**power, 50.0)) + values[2]


def _best(law: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The best of fits from several starts."""
    spread = max(float(np.ptp(y)), 1e-6)
    found = []
    for exponent in EXPONENTS:
        if law == "increasing":
            start = [math.log(exponent), math.log(spread / 10), float(y.max())]
        else:
            start = [math.log(exponent), math.log(3.0), max(float(y.min()) - 0.05 * spread, 0.0), math.log(spread)]
        values = _refit(law, x, y, np.asarray(start), MOST_STEPS)
        found.append((float(np.sum((_curve(law, x, values) - y) ** 2)), tuple(values)))
    return np.asarray(min(found)[1])


def _refit(law: str, x: np.ndarray, y: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """The values of least squares, as far as so many steps bring them; A0 is a ratio, a is .01 to 5."""
    lower, upper = np.array([[math.log(1e-2), -30.0, 0.0, -30.0], [math.log(5.0), 8.0, 1.0, 30.0]])[:, : len(start)]
    inside = np.clip(start, lower + 1e-9, upper - 1e-9)
    tight: dict[str, float] = dict.fromkeys(("xtol", "ftol", "gtol"), 1e-10)
    return optimize.least_squares(
        lambda values: _curve(law, x, values) - y, inside, bounds=(lower, upper), max_nfev=steps, **tight
    ).x


def _blocks(residuals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many residuals, in runs of sqrt(n) drawn with replacement."""
    count = len(residuals)
    size = max(1, round(math.sqrt(count)))
    starts = rng.integers(0, count - size + 1, -(-count // size))
    return np.concatenate([residuals[start : start + size] for start in starts])[:count]


def _parameters(law: str, values: np.ndarray, scale: float) -> dict[str, float]:
    """With D in billions of tokens."""
    power, factor, unit = math.exp(values[0]), math.exp(values[1]), scale / BILLION
    found = {"a": power, "c": factor * unit ** (power if law == "increasing" else -power), "A0": float(values[2])}
    return found if law == "increasing" else {**found, "b": float(values[3])}
