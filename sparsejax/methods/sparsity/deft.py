"""DEFT: a density loss for parameter-efficient fine-tuning (2024, arXiv 2402.01911), and Hoyer's measure beside it.

Acts on the FFN's hidden vector a [F] (after the activation ops of the down map) of every layer, of encoder and decoder alike:

    deft    weight * mean over layers and tokens of mean_F a^2 / (a^2 + epsilon)      a smooth L0: 1/2 at |a| = sqrt(epsilon)
    hoyer   weight * mean over layers and tokens of (sum_F |a|)^2 / (F sum_F a^2)     1 for equal entries, 1 / F for one

in float32, padding left out. Published: epsilon 1e-7, weight 1, beside adapters of all kinds, with ReLU and GELU alike. The
gradient 2 a epsilon / (a^2 + epsilon)^2 peaks at |a| = sqrt(epsilon / 3) and is 2e-7 at 1: large activations are not shrunk, as
they are by L1. A token that passes several experts counts the sum of its terms.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.context import Context, Probe, Stat
from sparsejax.plugs import ConfigError, check, register
from sparsejax.train.loss import Outputs
from sparsejax.train.objectives import Batch, Stats, check_weight, stats_at, token_count


def smooth_density(a: Float[Array, "... F"], epsilon: float) -> Float[Array, ...]:
    """mean over F of a^2 / (a^2 + epsilon), float32."""
    square = jnp.square(a.astype(jnp.float32))
    fixed = jax.lax.stop_gradient(square)
    # The value by one form and the gradient by another, -epsilon / (a^2 + epsilon): that of the quotient is two large terms
    # whose difference, 2e-7 at |a| = 1, is lost in float32.
    slope = -epsilon / (square + epsilon)
    return jnp.mean(fixed / (fixed + epsilon) + (slope - jax.lax.stop_gradient(slope)), axis=-1)


def hoyer_density(a: Float[Array, "... F"]) -> Float[Array, ...]:
    """(sum |a|)^2 / (F sum a^2), float32, 0 for a row of zeros."""
    a = a.astype(jnp.float32)
    # sign instead of abs: the derivative of abs at 0 is 1 in JAX, and would push units that are silent.
    total, energy = jnp.sum(a * jnp.sign(a), axis=-1), jnp.sum(jnp.square(a), axis=-1)
    return jnp.where(energy > 0, jnp.square(total) / (a.shape[-1] * jnp.where(energy > 0, energy, 1.0)), 0.0)


class _RowTerm(abc.ABC):
    """weight * mean over layers and tokens of what `row` gives of each token's hidden vector."""

    weight: float
    site: str

    @abc.abstractmethod
    def row(self, hidden: Float[Array, "... F"]) -> Float[Array, ...]:
        """What counts of each token."""

    def probes(self) -> tuple[Probe, ...]:
        return (Probe(self.site, self._measure),)

    def denominator(self, batch: Batch) -> Array:
        return token_count(batch)

    def numerator(self, outputs: Outputs, batch: Batch, stats: Stats, step: object) -> Array:
        found = stats_at(stats, self.site, self._name)
        if not found:
            raise ConfigError(f"objectives: {self._name!r} found no tensor at site = {self.site!r}")
        layers = sum(stat[self._name].value.size for stat in found)
        if "segment_ids" not in batch:  # images: no batch counts their tokens, so the mean over rows
            means = sum(jnp.sum(s[self._name].value / jnp.maximum(s["counted"].value, 1.0)) for s in found)
            return self.weight * means / layers * token_count(batch)
        # The denominator counts the tokens of both stacks, each of which passes its own stack's layers alone.
        total = sum((jnp.sum(stat[self._name].value) for stat in found), jnp.zeros((), jnp.float32))
        return self.weight * total * len(found) / layers

    @property
    def _name(self) -> str:
        return type(self).__name__.lower()

    def _measure(self, hidden: Array, ctx: Context) -> dict[str, Stat]:
        rows, mask = self.row(hidden), ctx.token_mask
        counted = jnp.asarray(rows.size, jnp.float32) if mask is None else jnp.sum(mask, dtype=jnp.float32)
        return {self._name: Stat(jnp.sum(rows if mask is None else jnp.where(mask, rows, 0))), "counted": Stat(counted)}


@register("objective", "deft")
@dataclass(frozen=True)
class Deft(_RowTerm):
    """weight: alpha; epsilon: of the surrogate; site: the tensors that are penalised."""

    weight: float = 1.0
    epsilon: float = 1e-7
    site: str = "mlp.hidden"

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check(0 < self.epsilon < float("inf"), "epsilon", self.epsilon, "must be positive")

    def row(self, hidden: Float[Array, "... F"]) -> Float[Array, ...]:
        return smooth_density(hidden, self.epsilon)


@register("objective", "hoyer")
@dataclass(frozen=True)
class Hoyer(_RowTerm):
    """weight; site: the tensors that are penalised."""

    weight: float = 1.0
    site: str = "mlp.hidden"

    def __post_init__(self) -> None:
        check_weight(self.weight)

    def row(self, hidden: Float[Array, "... F"]) -> Float[Array, ...]:
        return hoyer_density(hidden)
