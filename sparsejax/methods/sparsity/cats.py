"""CATS: a gated FFN computes only the units whose gate is large (Lee et al., 2024, arXiv 2404.08763).

"CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models". Acts in the FFN, behind the gate's activation
a = SiLU(x W_gate) [.., F]; attention stays dense. One scalar threshold per layer, from calibration data:

    t = min {t' : F(t') >= sparsity}, F the empirical distribution of |a| over tokens and units
    y = ((a * 1[|a| > t]) * (x W_up)) W_down

Published: sparsity .5, .7, .9 of the hidden units, 500 samples; a histogram of 20,000 bins on [-2, 2], exact quantiles here.
Of a Llama-2-7B block .5 saves 22 % of the bytes (up and down, not the gate), which is where tables at equal model sparsity part
from the paper's own.
Not here: the LoRA tuning afterwards, and the fused kernel; `gathered_ffn` specifies what it computes where no more than
`capacity` units are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparsejax import plugs
from sparsejax.compress.statistics import Quantiles
from sparsejax.methods.sparsity.gate_threshold import GatePass
from sparsejax.ops.selectors import threshold_mask

CAPACITY_FACTOR, CAPACITY_MULTIPLE = 1.25, 128


@plugs.register("pass", "cats")
@dataclass
class Cats(GatePass):
    """One threshold per layer at the same share of hidden units."""

    def threshold(self, a: Float[np.ndarray, "N F"], u: Float[np.ndarray, "N F"], down: Any) -> np.ndarray:
        """The sparsity-quantile of |a|."""
        return np.asarray(Quantiles(np.abs(a))(self.sparsity), np.float32)


def capacity(hidden: int, sparsity: float) -> int:
    """Units to make room for where their number varies: ceil((1 - sparsity) F * 1.25 / 128) * 128, at most F."""
    tiles = math.ceil((1 - sparsity) * hidden * CAPACITY_FACTOR / CAPACITY_MULTIPLE)
    return min(hidden, tiles * CAPACITY_MULTIPLE)


def gathered_ffn(
    x: Float[Array, " D"], a: Float[Array, " F"], up: Float[Array, "D F"], down: Float[Array, "F D"], threshold: Any, room: int
) -> tuple[Float[Array, " D"], Bool[Array, ""]]:
    """(y of one token, whether units were lost): the columns of `up` and rows of `down` of the kept units alone are read.

    Args:
      a: the gate's activation.
      threshold: [] or [F].
      room: static; see `capacity`. Of more than `room` kept units the first are computed, and the flag is raised.
    """
    mask = threshold_mask(jnp.abs(a), threshold)
    count = jnp.sum(mask)
    chosen = jnp.nonzero(mask, size=room, fill_value=a.shape[-1] - 1)[0]
    hidden = (x @ jnp.take(up, chosen, axis=1)) * a[chosen] * (jnp.arange(room) < count)
    return hidden @ jnp.take(down, chosen, axis=0), count > room
