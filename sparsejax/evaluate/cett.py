"""CETT, the cumulative error of tail truncation ("Sparsing Law", 2024, arXiv 2411.02335).

What neuron i adds to the FFN's output is n_i = h_i Wd[i, :], of norm |h_i| * ||Wd[i, :]||. For a threshold t,

    CETT(t) = mean over tokens of  || sum_{i: ||n_i|| <= t} n_i ||  /  || h Wd ||

is the relative error of leaving the tail out, and its share of the neurons the sparsity. Truncated contributions may cancel, so
CETT need not grow with t: the threshold for a bound c is the largest t of a grid whose CETT is at most c, and from there
linearly to the grid's next. CETT(0) = 0 drops exact zeros alone; with everything in the tail it is 1. A token whose output is
zero counts 0. Rescaling a neuron (h_i a, Wd[i] / a) changes nothing. The tail is <= t since selectors keep what is > t.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Steps of the grid, at equal shares of the entries that are not zero.
GRID = 32


class CettCurve(NamedTuple):
    """A layer's trade between error and sparsity on calibration tokens; G + 1 points, the first at t = 0.

    Fields:
      threshold: on |h_i| * ||Wd[i, :]||, increasing.
      cett, sparsity: at these.
    """

    threshold: np.ndarray
    cett: np.ndarray
    sparsity: np.ndarray

    def at(self, c: float) -> tuple[float, float]:
        """(threshold, sparsity) for CETT at most c."""
        below = int(np.flatnonzero(self.cett <= c)[-1])
        if below + 1 == len(self.cett):
            return float(self.threshold[-1]), float(self.sparsity[-1])
        part = (c - self.cett[below]) / (self.cett[below + 1] - self.cett[below])

        def between(values: np.ndarray) -> float:
            return float(values[below] + part * (values[below + 1] - values[below]))

        return between(self.threshold), between(self.sparsity)

    @property
    def decreases(self) -> int:
        """Steps of the grid along which CETT falls: how far it is from monotone here."""
        return int(np.sum(np.diff(self.cett) < 0))


def neuron_norms(kernel: Float[Array, "F D"]) -> Float[Array, " F"]:
    """||Wd[i, :]||, float32."""
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=-1)


@jax.jit
def cett(h: Float[Array, "N F"], kernel: Float[Array, "F D"], thresholds: Float[Array, " G"]) -> Float[Array, " G"]:
    """CETT at each threshold, float32."""
    h, kernel = h.astype(jnp.float32), kernel.astype(jnp.float32)
    size = jnp.abs(h) * neuron_norms(kernel)[None]
    whole = jnp.linalg.norm(h @ kernel, axis=-1)

    def one(threshold: Array) -> Array:
        tail = jnp.linalg.norm(jnp.where(size <= threshold, h, 0) @ kernel, axis=-1)
        return jnp.mean(jnp.where(whole > 0, tail / jnp.maximum(whole, 1e-30), 0))

    return jax.lax.map(one, thresholds)


def cett_curve(h: Float[Array, "N F"], kernel: Float[Array, "F D"], grid: int = GRID) -> CettCurve:
    """The curve of one FFN.

    Args:
      h: hidden vectors of calibration tokens.
      kernel: of the down map.
      grid: G, steps at equal shares of the entries that are not zero.
    """
    size = np.sort(np.abs(np.asarray(h, np.float32)) * np.asarray(neuron_norms(kernel)), axis=None)
    positive = size[np.searchsorted(size, 0, side="right") :]
    ranks = np.ceil(np.arange(1, grid + 1) / grid * len(positive)).astype(int) - 1
    thresholds = np.concatenate([[0.0], positive[ranks] if len(positive) else []]).astype(np.float32)
    thresholds = np.unique(thresholds)
    errors = np.array(cett(jnp.asarray(h), kernel, jnp.asarray(thresholds)), np.float64)
    errors[1:][-1:] = 1.0  # everything is in the tail; its quotient need not round to that
    return CettCurve(thresholds, errors, np.searchsorted(size, thresholds, side="right") / size.size)
