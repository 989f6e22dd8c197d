"""Attention of one query per sequence to a cache: decoding."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attend_one(
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B G S K"],
    v: Float[Array, "B G S V"],
    *,
    visible: Bool[Array, "B 1 S"] | None,
    scale: float,
    softcap: float = 0.0,
    bias: Float[Array, "*B H 1 S"] | None = None,
) -> Float[Array, "B 1 H V"]:
    """What `attend` gives for one query, from keys with their heads before their slots; float32 inside, q's type outside.

    Products are written as multiply and sum: a batched dot of these shapes takes XLA:CPU ten times as long from 2048 keys on
    (it copies the keys first).
    """
    batch, _, heads, size = q.shape
    groups = k.shape[1]
    query = q.astype(jnp.float32).reshape(batch, groups, heads // groups, 1, size) * scale
    logits = jnp.sum(query * k[:, :, None].astype(jnp.float32), axis=-1)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.reshape(-1, groups, heads // groups, bias.shape[-1]).astype(jnp.float32)
    if visible is not None:
        logits = jnp.where(visible[:, :, None], logits, -jnp.inf)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.sum(weights[..., None] * v[:, :, None].astype(jnp.float32), axis=-2)
    return (mixed / jnp.where(total == 0, 1, total)).astype(v.dtype).reshape(batch, 1, heads, v.shape[-1])
