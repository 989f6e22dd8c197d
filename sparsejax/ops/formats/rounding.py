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
    # Towards zero the rest is exact; floor(x + .5) is not: .49999997 + .5 is 1 in float32, and 1 - .49999997 is .5.
    whole = jnp.trunc(x)
    rest = jnp.abs(x - whole)
    nearer = (rest > 0.5) | ((rest == 0.5) & ((rounding == "away") | (x > 0)))
    onwards = drawn(rest, key) if rounding == "stochastic" else nearer
    return whole + jnp.where(onwards, jnp.sign(x), 0)


def drawn(probability: Float[Array, "*shape"], key: Array | None) -> Bool[Array, "*shape"]:
    """True with these probabilities; ConfigError without a key."""
    if key is None:
        raise ConfigError("round = 'stochastic': needs a random key")
    return jax.random.uniform(key, probability.shape, probability.dtype) < probability
