"""Cross-entropy without B x T x V numbers in memory, as sums that add over microbatches, shards and hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# float32 logits held at once, per device; 2**24 elements are 64 MiB.
CHUNK_ELEMENTS = 2**24


class Outputs(NamedTuple):
    """Weighted sums over the scored positions of a batch: negative log-likelihood (nats), squared logsumexp, hits, weights."""

    nll_sum: Array
    z_sum: Array
    correct_sum: Array
    weight_sum: Array


def per_token(logits: Float[Array, "... V"], targets: Int[Array, ...]) -> tuple[Array, Array, Array]:
    """(negative log-likelihood in nats, logsumexp, whether the target is the most likely), each [...]."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison with iota instead of a gather: its gradient is a fused select, a gather's is a scatter (slow everywhere).
    chosen = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    nll = log_z - jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    return nll, log_z, jnp.argmax(logits, axis=-1) == targets


def score(logits: Float[Array, "... V"], targets: Int[Array, ...], weights: Float[Array, ...]) -> Outputs:
    """The sums for float32 logits that are in memory."""
    nll, log_z, correct = per_token(logits, targets)
    return Outputs(jnp.sum(nll * weights), jnp.sum(jnp.square(log_z) * weights), jnp.sum(correct * weights), jnp.sum(weights))


def chunks_for(batch: int, length: int, vocab: int, devices: int) -> int:
    """Into how many pieces of equal length a [batch, length] is cut so that one piece's logits stay below CHUNK_ELEMENTS."""
    wanted = -(-batch * length * vocab // (CHUNK_ELEMENTS * devices))
    return next(n for n in range(max(1, wanted), length + 1) if length % n == 0) if wanted <= length else length


def score_chunked(
    head: Callable[[Array], Array],
    h: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunks: int,
) -> Outputs:
    """`score(head(h), ...)` in `chunks` pieces along T; each piece's logits are computed again in the backward pass."""
    if chunks == 1:
        return score(head(h), targets, weights)

    def pieces(x: Any) -> Any:
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def piece(total: Outputs, xs: Any) -> tuple[Outputs, None]:
        h_piece, targets_piece, weights_piece = xs
        found = score(head(h_piece), targets_piece, weights_piece)
        return jax.tree.map(jnp.add, total, found), None

    zero = Outputs(*(jnp.zeros((), jnp.float32) for _ in Outputs._fields))
    total, _ = jax.lax.scan(piece, zero, (pieces(h), pieces(targets), pieces(weights)))
    return total
