"""Token-choice routing: scores to experts and weights, the auxiliary terms, and where each assignment's row goes.

An *assignment* is one (token, choice) pair, numbered `token * k + choice`. A dispatch is described by two index arrays that are
inverse to each other: the assignment of each row and the row of each assignment, with one past the end for "none". Routing
runs in float32 whatever the model computes in.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

COMBINE = ("raw", "renorm")
GRANULARITY = ("batch", "sequence")


class Routing(NamedTuple):
    """experts: int32[..., k], best first; weights: float32[..., k]; probabilities: float32[..., E]."""

    experts: Int[Array, "... k"]
    weights: Float[Array, "... k"]
    probabilities: Float[Array, "... E"]


def softmax_top_k(logits: Float[Array, "... E"], k: int, combine: str) -> Routing:
    """The k most probable experts of each token.

    Args:
      logits: router scores h.
      k: experts per token, 1 to E; ties go to the lower index.
      combine: `raw` w = p[idx]; `renorm` w = p[idx] / sum p[idx], which equals a softmax over the k chosen logits.
    Raises:
      ValueError: k or combine out of range, or `renorm` with k = 1: the weight is then 1 and the router gets no gradient.
    Source: Shazeer et al. 1701.06538; Switch 2101.03961 (raw); Mixtral 2401.04088 (renorm).
    """
    num_experts = logits.shape[-1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k = {k}: must be 1 to the number of experts, {num_experts}")
    if combine not in COMBINE:
        raise ValueError(f"combine = {combine!r}: allowed are {COMBINE}")
    if combine == "renorm" and k == 1:
        raise ValueError("combine = 'renorm' with k = 1 makes every weight 1, so the router would get no gradient; use 'raw'")
    logits = logits.astype(jnp.float32)
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(logits), k)
    # one_hot and a sum, not a gather: the gradient of a gather is a scatter-add, which is not deterministic on GPU.
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    if combine == "raw":
        weights = jnp.sum(chosen * probabilities[..., None, :], axis=-1)
    else:
        weights = jax.nn.softmax(jnp.sum(chosen * logits[..., None, :], axis=-1), axis=-1)
    return Routing(experts, weights, probabilities)


def load_balance(routing: Routing, mask: Bool[Array, "B T"], granularity: str = "batch") -> Float[Array, ""]:
    """E * sum_e f_e P_e, f_e the share of assignments and P_e the mean probability of expert e: 1 at balance, E at collapse.

    The gradient flows through P alone. Padding (mask False) counts in neither.

    Args:
      routing: of [B, T] tokens.
      granularity: `batch`: f and P over all tokens given; `sequence`: per row of the batch, then the mean over rows weighted by
        their tokens. Only the second is the same however a batch is cut into microbatches.
    Source: Switch 2101.03961 equation 4, with f over assignments so that the value does not depend on k.
    """
    if granularity not in GRANULARITY:
        raise ValueError(f"granularity = {granularity!r}: allowed are {GRANULARITY}")
    over = (0, 1) if granularity == "batch" else (1,)
    num_experts, k = routing.probabilities.shape[-1], routing.experts.shape[-1]
    counted = mask[..., None].astype(jnp.float32)
    tokens = jnp.sum(counted[..., 0], axis=over)
    safe = jnp.maximum(tokens, 1.0)[..., None]
    used = jnp.sum(jax.nn.one_hot(routing.experts, num_experts, dtype=jnp.float32), axis=-2)
    share = jnp.sum(used * counted, axis=over) / (k * safe)
    probability = jnp.sum(routing.probabilities * counted, axis=over) / safe
    value = num_experts * jnp.sum(share * probability, axis=-1)
    return jnp.sum(value * tokens) / jnp.maximum(jnp.sum(tokens), 1.0)


def router_z(logits: Float[Array, "B T E"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean over tokens of (logsumexp_e h)^2, which keeps the logits small; (ln E)^2 at h = 0. Source: ST-MoE 2202.08906."""
    squared = jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))
    return jnp.sum(squared * mask) / jnp.maximum(jnp.sum(mask), 1)


def expert_load(experts: Int[Array, "B T k"], mask: Bool[Array, "B T"], num_experts: int) -> Float[Array, " E"]:
    """Assignments per expert, before any is dropped."""
    used = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32) * mask[..., None, None]
    return jnp.sum(used, axis=(0, 1, 2))


def capacity_per_expert(factor: float, tokens: int, k: int, num_experts: int) -> int:
    """C = ceil(factor * T * k / E), at least 1 and at most T (a token chooses an expert once)."""
    return min(tokens, max(1, math.ceil(factor * tokens * k / num_experts)))


class Dispatch(NamedTuple):
    """Where assignments go.

    assignments: the assignment of each row, n where a row is empty.
    rows: the row of each assignment, R where it is dropped.
    groups: rows per expert when rows are sorted by expert, else None.
    """

    assignments: Int[Array, " R"]
    rows: Int[Array, " n"]
    groups: Int[Array, " E"] | None


def dispatch_with_capacity(
    experts: Int[Array, "T k"], mask: Bool[Array, " T"], num_experts: int, capacity: int
) -> Dispatch:
    """C rows for each of E experts, R = E * C; what finds its expert full is dropped.

    First choices are served before second choices, each in token order (choice-major: the least weight is lost). Padding
    takes no place.
    Source: GShard 2006.16668.
    """
    tokens, k = experts.shape
    total = num_experts * capacity
    used = jax.nn.one_hot(experts.T.reshape(-1), num_experts, dtype=jnp.int32) * jnp.tile(mask, k)[:, None]
    before = jnp.sum((jnp.cumsum(used, axis=0) - used) * used, axis=-1).reshape(k, tokens).T
    kept = mask[:, None] & (before < capacity)
    rows = jnp.where(kept, experts * capacity + before, total).reshape(-1)
    empty = jnp.full((total,), tokens * k, jnp.int32)
    return Dispatch(empty.at[rows].set(jnp.arange(tokens * k, dtype=jnp.int32), mode="drop"), rows, None)


def dispatch_dropless(experts: Int[Array, "T k"], mask: Bool[Array, " T"], num_experts: int) -> Dispatch:
    """All assignments sorted by expert, R = T * k; padding is sorted last and belongs to no group.

    The sort is stable, so equal inputs give equal bits. Source: MegaBlocks 2211.15841.
    """
    tokens, k = experts.shape
    expert = jnp.where(mask[:, None], experts, num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    rows = jnp.zeros_like(order).at[order].set(jnp.arange(tokens * k, dtype=jnp.int32), unique_indices=True)
    return Dispatch(order, rows, jnp.bincount(expert, length=num_experts).astype(jnp.int32))


@jax.custom_vjp
def permute_rows(x: Float[Array, "M D"], source: Int[Array, " R"], inverse: Int[Array, " M"]) -> Float[Array, "R D"]:
    """x[source], with zeros where source is M.

    `inverse` must say where each row of x went (R: nowhere). The gradient is then a gather too, where differentiating the
    gather would give a scatter-add: slow, and on GPU not deterministic.
    """
    return x.at[source].get(mode="fill", fill_value=0)


def _permute_forward(x: Array, source: Array, inverse: Array) -> tuple[Array, tuple[Array]]:
    return permute_rows(x, source, inverse), (inverse,)


def _permute_backward(residuals: tuple[Array], g: Array) -> tuple[Array, None, None]:
    return g.at[residuals[0]].get(mode="fill", fill_value=0), None, None


permute_rows.defvjp(_permute_forward, _permute_backward)
