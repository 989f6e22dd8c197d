"""Multi-head attention with its projections, rotary positions and cache; which keys are seen is `ops.attend`'s business."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.context import Context, Stat, merge_stats
from sparsejax.layers.linear import Init, Linear, SiteRules
from sparsejax.layers.norm import Norm
from sparsejax.models.config import ModelConfig, NormConfig
from sparsejax.nnx_compat import Module
from sparsejax.ops.attend import attend, attention_entropy
from sparsejax.ops.rope import apply_rope

Cache = dict[str, Array]


class Attention(Module):
    """Self-attention (`kind` global or local), or cross-attention to `ctx.memory`; sites `SITE.q`, `.k`, `.v`, `.o`."""

    def __init__(self, config: ModelConfig, *, key: Array, site: str, rules: SiteRules, kind: str, causal: bool):
        a = config.attention
        self.kind, self.causal = kind, causal
        self.heads, self.kv_heads, self.head_dim = a.num_heads, a.num_kv_heads, a.head_dim
        self.window = a.window if kind == "local" else 0
        self.softcap, self.backend = a.softcap, a.backend
        self.scale = a.scale or a.head_dim**-0.5
        self.rotary = config.positions.kind == "rope" and kind != "cross"
        self.relative = config.positions.kind == "relative" and kind != "cross"
        keys = jax.random.split(key, 4)
        shared: dict[str, Any] = dict(rules=rules, init=Init.parse(config.init))
        width, inner, inner_kv = config.d_model, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim

        def linear(index: int, name: str, size: int, axis: str) -> Linear:
            return Linear(width, size, key=keys[index], site=f"{site}.{name}", axes=("embed", axis), bias=a.bias, **shared)

        self.q = linear(0, "q", inner, "heads")
        self.k = linear(1, "k", inner_kv, "kv_heads")
        self.v = linear(2, "v", inner_kv, "kv_heads")
        self.o = Linear(inner, width, key=keys[3], site=f"{site}.o", axes=("heads", "embed"), bias=a.out_bias, **shared)
        norm = NormConfig("rms", config.norm.epsilon, False, config.norm.plus_one)
        self.q_norm, self.k_norm = (Norm(a.head_dim, norm, axis=None) if a.qk_norm else None for _ in range(2))

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], dict[str, Any], Cache | None]:
        source = ctx.memory if self.kind == "cross" else x
        q = self._heads(self.q(x, ctx), self.heads, self.q_norm)
        k = self._heads(self.k(source, ctx), self.kv_heads, self.k_norm)
        v = self._heads(self.v(source, ctx), self.kv_heads, None)
        if self.rotary:
            tables = ctx.tables[f"rope.{self.kind}"]
            q, k = apply_rope(q, *tables), apply_rope(k, *tables)
        visible = self._visible(ctx)
        if cache is not None and self.kind != "cross":
            k, v, visible, cache = _extend(cache, k, v, ctx, visible)
        bias = ctx.tables["relative_bias"] if self.relative else None
        out = attend(q, k, v, scale=self.scale, softcap=self.softcap, bias=bias, backend=self.backend, **visible)
        stats = self._entropy(q, k, bias, visible, ctx)
        batch, length = x.shape[:2]
        out = out.reshape(batch, length, self.heads * self.head_dim)
        stats = merge_stats(stats, ctx.measure("attn.out", out))
        return self.o(out, ctx), stats, cache

    def _heads(self, projected: Array, count: int, norm: Norm | None) -> Array:
        split = projected.reshape(*projected.shape[:2], count, self.head_dim)
        return split if norm is None else norm(split)

    def _visible(self, ctx: Context) -> dict[str, Any]:
        """Which keys each query may see, for `attend`."""
        if self.kind == "cross":
            return (
                dict(causal=False, query_segment_ids=ctx.segment_ids, key_segment_ids=ctx.memory_segment_ids)
                if ctx.memory_segment_ids is not None
                else dict(causal=False)
            )
        visible: dict[str, Any] = dict(causal=self.causal, window=self.window)
        if ctx.segment_ids is not None:
            visible.update(query_segment_ids=ctx.segment_ids, key_segment_ids=ctx.segment_ids)
        if ctx.prefix is not None:
            visible["prefix"] = ctx.prefix > 0
        return visible

    def _entropy(self, q: Array, k: Array, bias: Any, visible: dict[str, Any], ctx: Context) -> dict[str, Any]:
        if not any(probe.site == "attn.entropy" for probe in ctx.probes):
            return {}
        entropy = attention_entropy(q, k, scale=self.scale, softcap=self.softcap, bias=bias, **visible)
        return {"attn": {"entropy": Stat(entropy, "mean")}}


def _extend(cache: Cache, k: Array, v: Array, ctx: Context, visible: dict[str, Any]) -> tuple[Array, Array, dict, Cache]:
    """Write k and v of the present tokens into the cache, from slot `cache["length"]` on, and attend to all of it."""
    start = cache["length"]
    batch, count = k.shape[:2]
    segments = ctx.segment_ids if ctx.segment_ids is not None else jnp.ones((batch, count), jnp.int32)

    def write(store: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(store, new.astype(store.dtype), start, axis=1)

    cache = {
        "k": write(cache["k"], k),
        "v": write(cache["v"], v),
        "positions": write(cache["positions"], ctx.positions),
        "segment_ids": write(cache["segment_ids"], segments),
        "length": start + count,
    }
    visible = {
        **visible,
        "query_segment_ids": segments,
        "key_segment_ids": cache["segment_ids"],
        "query_positions": ctx.positions,
        "key_positions": cache["positions"],
    }
    return cache["k"], cache["v"], visible, cache


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: Any) -> Cache:
    """The cache of one layer for `length` tokens; segment 0 marks a slot that is not written."""
    shape = (batch, length, config.attention.num_kv_heads, config.attention.head_dim)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "positions": jnp.zeros((batch, length), jnp.int32),
        "segment_ids": jnp.zeros((batch, length), jnp.int32),
        "length": jnp.zeros((), jnp.int32),
    }
