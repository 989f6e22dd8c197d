"""Rounding to whole numbers, by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.plugs import ConfigError

ROUNDINGS = ("even", "away", "half_up", "stochastic")


def rounded(x: Float[Array, "*shape"], rounding: str, key: Array | None = None) -> Float[Array, "*shape"]:
    """x as whole numbers in its own dtype.

    Args:
      x: NaN stays NaN.
      rounding: where the halves go: `even` (the even neighbour, IEEE), `away` (from zero, C's roundf), `half_up` (to
        +inf); or `stochastic`: up with the probability of the fraction, so that the mean is x.
      key: of the random numbers; needed by `stochastic` alone.
    Raises:
      ConfigError: stochastic rounding without a key.
    """
    if rounding == "even":
        return jnp.round(x)
    below = jnp.floor(x)
    # Compared, not added: .49999997 + .5 is 1 in float32, and a whole number plus .9999999 may be the next one.
    return below + rounds_up(x - below, rounding, key, x > 0, below % 2 == 1).astype(x.dtype)


def rounds_up(
    fraction: Float[Array, "*shape"],
    rounding: str,
    key: Array | None,
    positive: Bool[Array, "*shape"],
    odd: Bool[Array, "*shape"],
) -> Bool[Array, "*shape"]:
    """Whether a number at `fraction` of the way from its lower to its upper neighbour goes to the upper one.

    positive: whether the number is above zero, for `away`; odd: whether the lower neighbour is, for `even`.
    """
    if rounding == "stochastic":
        if key is None:
            raise ConfigError("round = 'stochastic': needs a random key")
        return jax.random.uniform(key, fraction.shape, fraction.dtype) < fraction
    if rounding == "half_up":
        return fraction >= 0.5
    return (fraction > 0.5) | ((fraction == 0.5) & (positive if rounding == "away" else odd))
