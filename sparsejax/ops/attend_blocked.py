"""Attention by blocks of queries: each block reads only the keys that its queries can see, so no T x S array is made.

Measured on 2 CPU cores (fp32, 8 x 256 x 8 heads x 32, CPU time of forward + backward): blocks of 64 take 37 ms, of 128
54 ms, a full masked softmax 102 ms. The blocks are chained by an optimization barrier: without it XLA:CPU keeps the logits
of all blocks alive, which at T = 1024 costs 2.5x the memory and 2x the time of the forward pass (fresh pages, cold caches).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from sparsejax.ops.attend_visibility import Span, Visibility, take_span

Bias = Array | Callable[[Array, Array], Array]

# Probabilities kept for the backward pass are read back from memory: forward and backward on CPU take 37 ms against 44 ms
# recomputed at 8 x 256, but 111 against 70 at 4 x 512 and 219 against 136 at 2 x 1024 (CPU time, 8 heads of 32).
_LARGEST_KEPT = 256 * 256

# More blocks than this are looped over: a traced block costs .04 s of trace and lowering, with its gradient.
_MOST_TRACED, _STRETCHES = 8, 4


def attention_weights(
    q: Float[Array, "B G R T K"],
    k: Float[Array, "B G S K"],
    visible: Array | None,
    bias: Array | None,
    softcap: float,
    scale: float,
) -> tuple[Float[Array, "B G RT S"], Float[Array, "B G RT 1"], Float[Array, "B G RT S"]]:
    """Unnormalised softmax weights exp(s - max), their sum over keys, and s - max, in at least float32.

    s = softcap * tanh(scale * q.k / softcap) + bias, and -inf where not visible. A row that sees nothing has weights and sum 0.
    The R query heads of a key head are rows of one product: a fifth dimension costs XLA:CPU 15 %.
    """
    precise = jnp.promote_types(q.dtype, jnp.float32)
    batch, groups, repeats, length, head_dim = q.shape
    rows = q.reshape(batch, groups, repeats * length, head_dim)
    logits = jnp.einsum("bgtk,bgsk->bgts", rows, k, preferred_element_type=precise) * scale
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        *leading, heads, _, keys = bias.shape
        logits = logits + bias.reshape(*(leading or (1,)), groups, heads // groups * length, keys).astype(precise)
    if visible is not None:
        # Added rather than selected: a select would keep its T x S predicate for the backward pass.
        hidden = jnp.where(visible, 0.0, -jnp.inf).astype(precise)[:, None]
        logits = logits + (hidden if hidden.shape[2] == 1 else jnp.tile(hidden, (1, 1, repeats, 1)))
    peak = lax.stop_gradient(logits.max(-1, keepdims=True))
    logits = logits - jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = jnp.exp(logits)
    return weights, weights.sum(-1, keepdims=True), logits


def blocked_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    visibility: Visibility,
    *,
    bias: Bias | None,
    softcap: float,
    scale: float,
    block_size: int,
    recompute: bool | None = None,
) -> Float[Array, "B T H V"]:
    """Attention of q to k and v in blocks of `block_size` queries (the specification when it is at least T).

    Args:
      recompute: whether the backward pass recomputes each block's probabilities; None decides by T * S.
    """
    batch, length, heads, _ = q.shape
    groups = k.shape[2]
    query = q.reshape(batch, length, groups, heads // groups, q.shape[-1]).transpose(0, 2, 3, 1, 4)
    key, value = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if recompute is None:
        recompute = length > block_size and length * k.shape[1] > _LARGEST_KEPT
    block = partial(_attend_block, visibility=visibility, bias=bias, softcap=softcap, scale=scale, recompute=recompute)
    outputs: list[Array] = []
    for blocks in _stretches(length, block_size):
        stretch = Span(blocks.start, min(blocks.stop, length) - blocks.start)
        query_part = take_span(query, stretch, axis=3)
        if outputs:
            query_part, outputs[-1] = lax.optimization_barrier((query_part, outputs[-1]))
        keys = visibility.key_span(stretch)
        key_part, value_part = take_span(key, keys, axis=2), take_span(value, keys, axis=2)
        if len(blocks) == 1:
            outputs.append(block(query_part, key_part, value_part, stretch, keys))
        else:
            outputs.append(_loop(block, query_part, key_part, value_part, blocks, keys, visibility))
    out = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, v.shape[-1])


def _stretches(length: int, block_size: int) -> list[range]:
    """Starts of blocks, in the stretches whose blocks share one traced body.

    Up to _MOST_TRACED blocks stand alone, each with just the keys that it sees. More are looped over in _STRETCHES stretches
    (and a shorter last block alone), so that tracing costs the same at any length; under causal order a stretch reads its
    last block's keys, so that 4 stretches compute (1 + 1/4) / (1 + 1/blocks) times the logits.
    """
    whole, starts = length // block_size, range(0, length, block_size)
    if len(starts) <= _MOST_TRACED:
        return [starts[i : i + 1] for i in range(len(starts))]
    edges = [whole * i // _STRETCHES for i in range(_STRETCHES + 1)]
    found = [starts[low:high] for low, high in itertools.pairwise(edges)]
    return found + [starts[whole:]] * (whole < len(starts))


def _loop(
    block: Callable[..., Array], query: Array, key: Array, value: Array, blocks: range, keys: Span, visibility: Visibility
) -> Array:
    """The blocks of one stretch in a loop; `query`, `key` and `value` are the stretch's, keys from `keys.start` on."""
    batch, groups, repeats, length, head_dim = query.shape
    spans = [visibility.key_span(Span(start, blocks.step)) for start in blocks]
    size = max(span.size for span in spans)
    first_keys = np.array([min(span.start, keys.start + keys.size - size) for span in spans])
    by_block = query.reshape(batch, groups, repeats, len(blocks), blocks.step, head_dim).transpose(3, 0, 1, 2, 4, 5)

    def body(_: None, step: tuple[Array, Array, Array]) -> tuple[None, Array]:
        query_block, start, first_key = step
        within = Span(0 if size == keys.size else first_key - keys.start, size)
        seen = take_span(key, within, axis=2), take_span(value, within, axis=2)
        return None, block(query_block, *seen, Span(start, blocks.step), Span(first_key, size))

    out = lax.scan(body, None, (by_block, jnp.asarray(np.array(blocks)), jnp.asarray(first_keys)))[1]
    return out.transpose(1, 2, 3, 0, 4, 5).reshape(batch, groups, repeats, length, value.shape[-1])


def _attend_block(
    query: Array,
    key: Array,
    value: Array,
    queries: Span,
    keys: Span,
    *,
    visibility: Visibility,
    bias: Bias | None,
    softcap: float,
    scale: float,
    recompute: bool,
) -> Array:
    def block(query: Array, key: Array, value: Array) -> Array:
        visible, bias_block = visibility.block(queries, keys), block_bias(bias, visibility, queries, keys)
        weights, total, _ = attention_weights(query, key, visible, bias_block, softcap, scale)
        mixed = jnp.einsum("bgts,bgsv->bgtv", weights.astype(value.dtype), value, preferred_element_type=weights.dtype)
        mixed = (mixed / jnp.where(total == 0, 1, total)).astype(value.dtype)
        return mixed.reshape(*query.shape[:-1], value.shape[-1])

    return (jax.checkpoint(block) if recompute else block)(query, key, value)


def block_bias(bias: Bias | None, visibility: Visibility, queries: Span, keys: Span) -> Array | None:
    """The [H, Tb, Sb] or [B, H, Tb, Sb] piece of a bias array, or what a bias function gives for the block's positions."""
    if bias is None:
        return None
    if callable(bias):
        return bias(*visibility.block_positions(queries, keys))
    return take_span(take_span(bias, queries, axis=-2), keys, axis=-1)
