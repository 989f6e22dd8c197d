"""Objectives: the terms of the loss, each a numerator over a batch's own denominator.

A microbatch contributes `numerator(its outputs) / denominator(the whole batch)`, so that accumulation over microbatches with
ragged masks gives the loss and the gradient of the large batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.context import Probe, Stat, site_matches
from sparsejax.plugs import ConfigError, check, register
from sparsejax.train.loss import Outputs

Batch = Mapping[str, Array]
Stats = Mapping[str, Mapping[str, Stat]]


class Objective(Protocol):
    """One term of the loss; a frozen dataclass registered under the kind "objective"."""

    def probes(self) -> tuple[Probe, ...]:
        """What must be measured inside the model for this term."""

    def denominator(self, batch: Batch) -> Float[Array, ""]:
        """What the term is divided by, from the whole batch."""

    def numerator(self, outputs: Outputs, batch: Batch, stats: Stats, step: Any) -> Float[Array, ""]:
        """The term of a batch or microbatch, its weight included, not yet divided.

        Raises:
          ConfigError: the model does not measure what the term needs.
        """


def token_count(batch: Batch) -> Float[Array, ""]:
    """Tokens that are not padding, of encoder and decoder together; of a batch without segments, its examples."""
    segments = [batch[name] for name in ("segment_ids", "encoder_segment_ids") if name in batch]
    if not segments:
        return jnp.asarray(batch["weights"].shape[0], jnp.float32)
    return sum((jnp.sum(ids > 0, dtype=jnp.float32) for ids in segments), jnp.zeros((), jnp.float32))


def stats_at(stats: Stats, glob: str, name: str) -> list[Mapping[str, Stat]]:
    """The statistics of every site that ends in `glob` and holds `name`; an encoder-decoder's sites have a prefix."""
    globs = (glob, f"**.{glob}")
    return [found for site, found in stats.items() if name in found and any(site_matches(g, site) for g in globs)]


def check_weight(weight: float) -> None:
    """Raise a ConfigError unless a term's weight is finite and not negative."""
    check(0 <= weight < float("inf"), "weight", weight, "must be finite and not negative")


@register("objective", "cross_entropy")
@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Mean negative log-likelihood in nats over the scored positions (examples, for a classifier)."""

    def probes(self) -> tuple[Probe, ...]:
        return ()

    def denominator(self, batch: Batch) -> Array:
        return jnp.sum(batch["weights"], dtype=jnp.float32)

    def numerator(self, outputs: Outputs, batch: Batch, stats: Stats, step: Any) -> Array:
        return outputs.nll_sum


@register("objective", "z_loss")
@dataclasses.dataclass(frozen=True)
class ZLoss:
    """weight * mean over scored positions of logsumexp(logits)^2: keeps the softmax normaliser near 1 (PaLM 2204.02311)."""

    weight: float = 1e-4

    def __post_init__(self) -> None:
        check_weight(self.weight)

    def probes(self) -> tuple[Probe, ...]:
        return ()

    def denominator(self, batch: Batch) -> Array:
        return jnp.sum(batch["weights"], dtype=jnp.float32)

    def numerator(self, outputs: Outputs, batch: Batch, stats: Stats, step: Any) -> Array:
        return self.weight * outputs.z_sum


def router_term(stats: Stats, statistic: str, objective: str) -> Array:
    """A router statistic averaged over the layers that have a router, each weighted by the tokens it saw."""
    found = stats_at(stats, "mlp.router", statistic)
    if not found:
        raise ConfigError(f"objectives: {objective!r} needs a router, but model.feed_pattern names no mixture of experts")
    tokens = sum(jnp.sum(stat["tokens"].value) for stat in found)
    return sum(jnp.sum(stat[statistic].value * stat["tokens"].value) for stat in found) / jnp.maximum(tokens, 1.0)


@dataclasses.dataclass(frozen=True)
class _RouterObjective:
    weight: float

    def __post_init__(self) -> None:
        check_weight(self.weight)

    def probes(self) -> tuple[Probe, ...]:
        return ()

    def denominator(self, batch: Batch) -> Array:
        return token_count(batch)


@register("objective", "router_balance")
@dataclasses.dataclass(frozen=True)
class RouterBalance(_RouterObjective):
    """weight * mean over layers of the load-balance term, 1 at balance (Switch 2101.03961).

    With `balance=batch` in the feed the term is that of each microbatch, with `balance=sequence` it does not depend on how the
    batch is cut.
    """

    weight: float = 1e-2

    def numerator(self, outputs: Outputs, batch: Batch, stats: Stats, step: Any) -> Array:
        return self.weight * router_term(stats, "balance", "router_balance") * token_count(batch)


@register("objective", "router_z")
@dataclasses.dataclass(frozen=True)
class RouterZ(_RouterObjective):
    """weight * mean over layers and tokens of logsumexp(router logits)^2 (ST-MoE 2202.08906)."""

    weight: float = 1e-3

    def numerator(self, outputs: Outputs, batch: Batch, stats: Stats, step: Any) -> Array:
        return self.weight * router_term(stats, "z", "router_z") * token_count(batch)
