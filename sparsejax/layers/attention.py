"""Multi-head attention with its projections and rotary positions; which keys are seen is `ops.attend`'s business.

With a cache (`layers.cache`) the mode says what is attended to: "prefill" starts an empty cache and attends to its own tokens,
any other mode attends to what the cache holds, its own tokens included.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.context import Context, Stat, merge_stats
from sparsejax.layers.cache import Dense, Keys, KVCache, cache_format, empty_cache
from sparsejax.layers.fused import Fused
from sparsejax.layers.linear import Init, Linear
from sparsejax.layers.norm import Norm
from sparsejax.layers.op import SiteRules
from sparsejax.models.config import ModelConfig, NormConfig
from sparsejax.nnx_compat import Module
from sparsejax.ops.attend import attend, attention_entropy
from sparsejax.ops.attend_blocked import block_bias
from sparsejax.ops.attend_one import attend_one
from sparsejax.ops.attend_visibility import Span, Visibility
from sparsejax.ops.rope import apply_rope


class Attention(Module):
    """Self-attention (`kind` global or local), or cross-attention to `ctx.memory`; sites `SITE.q`, `.k`, `.v`, `.o`."""

    def __init__(self, config: ModelConfig, *, key: Array, site: str, rules: SiteRules, kind: str, causal: bool):
        a = config.attention
        self.kind, self.causal = kind, causal
        self.part = "cross" if kind == "cross" else "attn"
        self.heads, self.kv_heads, self.head_dim = a.num_heads, a.num_kv_heads, a.head_dim
        self.window = a.window if kind == "local" else 0
        self.softcap, self.backend = a.softcap, a.backend
        # What is computed anew for every token (cross-attention's keys) or never kept (an encoder's) is in no cache.
        self.cache_format = cache_format(a.cache_format) if causal and kind != "cross" else Dense()
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
        self.qkv: Fused | None = None  # q, k and v as one product, in a serving form
        out: dict[str, Any] = dict(bias=a.out_bias, out_dtype=config.residual_dtype, **shared)
        self.o = Linear(inner, width, key=keys[3], site=f"{site}.o", axes=("heads", "embed"), **out)
        norm = NormConfig("rms", config.norm.epsilon, False, config.norm.plus_one)
        self.norm_by_head = a.qk_norm_over == "head"
        sizes = (a.head_dim, a.head_dim) if self.norm_by_head else (inner, inner_kv)
        self.q_norm, self.k_norm = (Norm(size, norm, axis=None) if a.qk_norm else None for size in sizes)

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], dict[str, Any], KVCache | None]:
        (q, k, v), entered = self._project(x, ctx)
        if self.rotary:
            tables = ctx.tables[f"rope.{self.kind}"]
            q, k = apply_rope(q, *tables), apply_rope(k, *tables)
        bias = ctx.tables["relative_bias"] if self.relative else None
        if cache is not None and self.kind != "cross":
            cache = cache.append(k, v, ctx.positions, ctx.segment_ids)
        if cache is None or self.kind == "cross" or ctx.mode == "prefill":
            visible = self._visible(ctx)
            k, v = self.cache_format.as_read(k, v)
            out = attend(q, k, v, scale=self.scale, softcap=self.softcap, bias=bias, backend=self.backend, **visible)
            stats = self._entropy(q, k, bias, visible, ctx)
        else:
            out = cache.attend(q, lambda keys: self._attend_keys(q, keys, bias, ctx))
            held = cache.read(cache.slots)
            stats = self._entropy(q, held.k.transpose(0, 2, 1, 3), bias, self._visible_keys(held, ctx), ctx)
        batch, length = x.shape[:2]
        out = out.reshape(batch, length, self.heads * self.head_dim)
        y, left = self.o.measured(out, ctx, f"{self.part}.o")
        return y, merge_stats(entered, stats, ctx.measure("attn.out", out), left), cache

    def empty_cache(self, batch: int, length: int, dtype: Any) -> KVCache:
        """This layer's cache for `length` tokens; a local layer keeps about its window."""
        window = self.window if self.causal else 0
        shape = dict(heads=self.kv_heads, head_dim=self.head_dim)
        return empty_cache(self.cache_format, batch, length, **shape, dtype=dtype, window=window)

    def _project(self, x: Array, ctx: Context) -> tuple[tuple[Array, Array, Array], dict[str, Any]]:
        """Queries of x, keys and values of x or of the memory, [B, T, heads, K]; and what was measured of what entered."""
        if self.qkv is not None:
            q, k, v = self.qkv(x, ctx)
            found = [ctx.measure(f"{self.part}.{name}", x) for name in "qkv"]
        else:
            source = ctx.memory if self.kind == "cross" else x
            q, entered_q = self.q.measured(x, ctx, f"{self.part}.q")
            k, entered_k = self.k.measured(source, ctx, f"{self.part}.k")
            v, entered_v = self.v.measured(source, ctx, f"{self.part}.v")
            found = [entered_q, entered_k, entered_v]
        heads = (
            self._heads(q, self.heads, self.q_norm),
            self._heads(k, self.kv_heads, self.k_norm),
            self._heads(v, self.kv_heads, None),
        )
        return heads, merge_stats(*found)

    def _attend_keys(self, q: Array, keys: Keys, bias: Any, ctx: Context) -> Array:
        """Attention of the present tokens to keys of the cache."""
        visible = self._visible_keys(keys, ctx)
        if q.shape[1] > 1:
            k, v = keys.k.transpose(0, 2, 1, 3), keys.v.transpose(0, 2, 1, 3)
            return attend(q, k, v, scale=self.scale, softcap=self.softcap, bias=bias, backend=self.backend, **visible)
        visibility = Visibility(1, keys.k.shape[2], **visible)
        block = Span(0, 1), Span(0, keys.k.shape[2])
        shared: dict[str, Any] = dict(scale=self.scale, softcap=self.softcap, bias=block_bias(bias, visibility, *block))
        return attend_one(q, keys.k, keys.v, visible=visibility.block(*block), **shared)

    def _visible_keys(self, keys: Keys, ctx: Context) -> dict[str, Any]:
        """Which keys of the cache each present token may see, for `attend`."""
        present = jnp.ones(ctx.positions.shape, jnp.int32) if ctx.segment_ids is None else ctx.segment_ids
        return dict(
            causal=self.causal,
            window=self.window,
            query_segment_ids=present,
            key_segment_ids=keys.segment_ids,
            query_positions=ctx.positions,
            key_positions=keys.positions,
        )

    def _heads(self, projected: Array, count: int, norm: Norm | None) -> Array:
        if norm is not None and not self.norm_by_head:
            projected, norm = norm(projected), None
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
