"""ProSparse: activation sparsity by an L1 penalty that rises in sine steps (Song et al., 2024, arXiv 2402.13516).

Acts on the FFN's hidden vector x_1 (after the activation ops of the down map):

    L = L_task + lambda(t) * sum_layers mean_tokens ||x_1||_1          summed over the F hidden units

lambda runs through stages i = 0..S that end at steps T_i with peaks lambda_i: lambda_0 until T_0, lambda_1 until T_1 (a
constant warm-up, jumping at T_0 by design), then
    eta(t) = (sin(-pi/2 + pi (t - T_{i-1}) / (T_i - T_{i-1})) + 1) / 2
    lambda(t) = lambda_{i-1} + eta(t) (lambda_i - lambda_{i-1})
and lambda_S after T_S. Published for 7B: 0/5e-3/5e-2/5e-2/2e-1/2e-1 at 5000/6000/10000/12000/16000/16500.
The paper does not say how it averages; the mean over tokens is our reading, and the scale of lambda depends on it. A token that
passes several experts counts the sum of their norms.
Not here: the change of activation to ReLU before, and FATReLU after (both are names in `model.ffn.activation`).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.context import Context, Probe, Stat
from sparsejax.plugs import ConfigError, check, register
from sparsejax.train.loss import Outputs
from sparsejax.train.objectives import Batch, Stats, stats_at, token_count


def sine_stages(step: Any, ends: tuple[float, ...], peaks: tuple[float, ...]) -> Float[Array, ""]:
    """lambda(step) of the module docstring.

    Args:
      step: t, may be traced.
      ends: T_i, increasing.
      peaks: lambda_i, one per end.
    """
    t = jnp.asarray(step, jnp.float32)
    value = jnp.float32(peaks[-1])
    for i in range(len(ends) - 1, 1, -1):
        eta = 0.5 * (jnp.sin(-jnp.pi / 2 + jnp.pi * (t - ends[i - 1]) / (ends[i] - ends[i - 1])) + 1)
        value = jnp.where(t <= ends[i], peaks[i - 1] + eta * (peaks[i] - peaks[i - 1]), value)
    for i in range(min(2, len(ends)) - 1, -1, -1):
        value = jnp.where(t <= ends[i], peaks[i], value)
    return value


def _l1(hidden: Float[Array, "... F"], ctx: Context) -> dict[str, Stat]:
    hidden = hidden.astype(jnp.float32)
    # Not jnp.abs: its derivative at 0 is 1 in JAX, and would push units that are silent.
    norms = jnp.sum(hidden * jax.lax.stop_gradient(jnp.sign(hidden)), axis=-1)
    mask = ctx.token_mask
    rows = jnp.asarray(norms.size, jnp.float32) if mask is None else jnp.sum(mask, dtype=jnp.float32)
    return {"l1": Stat(jnp.sum(norms if mask is None else jnp.where(mask, norms, 0))), "rows": Stat(rows)}


@register("objective", "l1")
@dataclasses.dataclass(frozen=True)
class ScheduledL1:
    """weights: peaks lambda_i; ends: steps T_i; site: the tensors that are penalised."""

    weights: tuple[float, ...]
    ends: tuple[int, ...]
    site: str = "mlp.hidden"

    def __post_init__(self) -> None:
        check(self.weights, "weights", self.weights, "must not be empty")
        check(len(self.ends) == len(self.weights), "ends", self.ends, f"must be as many as the weights, {len(self.weights)}")
        check(all(0 <= w < float("inf") for w in self.weights), "weights", self.weights, "must be finite and not negative")
        rising = all(a < b for a, b in itertools.pairwise((0, *self.ends)))
        check(rising, "ends", self.ends, "must be positive and increasing")

    def probes(self) -> tuple[Probe, ...]:
        return (Probe(self.site, _l1),)

    def denominator(self, batch: Batch) -> Array:
        return token_count(batch)

    def numerator(self, outputs: Outputs, batch: Batch, stats: Stats, step: Any) -> Array:
        """lambda(step) * sum over tokens and layers; for images, whose tokens no batch counts, the layers' means over rows."""
        found = stats_at(stats, self.site, "l1")
        if not found:
            raise ConfigError(f"objectives: 'l1' found no tensor at site = {self.site!r}")
        if "segment_ids" in batch:
            total = sum(jnp.sum(site["l1"].value) for site in found)
        else:
            means = sum(jnp.sum(site["l1"].value / jnp.maximum(site["rows"].value, 1.0)) for site in found)
            total = means * token_count(batch)
        return sine_stages(step, self.ends, self.weights) * total
