"""One block: `mix` moves information between tokens, `feed` works on each token; the residual adds are outside of both."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax import plugs
from sparsejax.arrays import dense
from sparsejax.context import Context, merge_stats
from sparsejax.layers.attention import Attention
from sparsejax.layers.cache import KVCache
from sparsejax.layers.norm import Norm
from sparsejax.layers.op import Op, SiteRules, apply, chain
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Module, weight
from sparsejax.parallel.rules import constrain

Delta = Float[Array, "B T D"]
Stats = dict[str, Any]


class Block(Module):
    """Attention, optional cross-attention and a feed module around one residual stream.

    `config.block`: pre (norm before each), post (norm after each add), sandwich (norm before and after, inside the add),
    parallel (mix and feed read the same normed input and are added together).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        key: Array,
        site: str,
        rules: SiteRules,
        attention: str,
        feed: str,
        causal: bool,
        cross: bool,
    ):
        keys = jax.random.split(key, 3)
        self.arrangement = config.block
        self.dtype = config.dtype if config.residual_dtype else ""
        self.attn = Attention(config, key=keys[0], site=f"{site}.attn", rules=rules, kind=attention, causal=causal)
        crossing: dict[str, Any] = dict(key=keys[1], site=f"{site}.cross", rules=rules, kind="cross", causal=False)
        self.cross = Attention(config, **crossing) if cross else None
        self.mlp = plugs.resolve("feed", feed, "model.feed_pattern").build(config, key=keys[2], site=f"{site}.mlp", rules=rules)
        self.attn_norm = Norm(config.d_model, config.norm)
        self.cross_norm = Norm(config.d_model, config.norm) if cross else None
        self.mlp_norm = Norm(config.d_model, config.norm)
        skip: dict[str, Any] = dict(shape=(config.d_model, config.d_model), axes=("embed", "embed"))
        self.skip_attn = chain(rules.at("residuals", f"{site}.residual.attn"), key=jax.random.fold_in(keys[0], 1), **skip)
        self.skip_mlp = chain(rules.at("residuals", f"{site}.residual.mlp"), key=jax.random.fold_in(keys[2], 1), **skip)
        sandwiched = config.block == "sandwich"
        self.attn_post_norm = Norm(config.d_model, config.norm) if sandwiched else None
        self.mlp_post_norm = Norm(config.d_model, config.norm) if sandwiched else None
        start = jnp.full((config.d_model,), config.layer_scale, jnp.float32)
        self.attn_scale = weight(start, ("embed",), "scale") if config.layer_scale else None
        self.mlp_scale = weight(start, ("embed",), "scale") if config.layer_scale else None

    def mix(self, h: Delta, ctx: Context, cache: KVCache | None) -> tuple[Delta, Stats, KVCache | None]:
        """The delta of self-attention (and of cross-attention after it, where there is one)."""
        delta, stats, cache = self.attn(self._before(self.attn_norm, h), ctx, cache)
        delta = self._after(self.attn_post_norm, self.attn_scale, delta)
        if self.cross is None:
            return delta, stats, cache
        middle = self._add(self.attn_norm, h, delta, {}, ctx)
        crossed, _, _ = self.cross(self._before(self.cross_norm, middle), ctx, None)
        # For a post-norm block the caller's add normalises last with cross_norm, see __call__.
        return (middle - h) + crossed, stats, cache

    def feed(self, h: Delta, ctx: Context) -> tuple[Delta, Stats]:
        """The delta of the feed module."""
        delta, stats = self.mlp(self._before(self.mlp_norm, h), ctx)
        return self._after(self.mlp_post_norm, self.mlp_scale, delta), stats

    def __call__(self, h: Delta, ctx: Context, cache: KVCache | None) -> tuple[Delta, Stats, KVCache | None]:
        delta, mix_stats, cache = self.mix(h, ctx, cache)
        if self.arrangement == "parallel":
            fed, feed_stats = self.feed(h, ctx)
            h = dense(apply(self.skip_attn, h, ctx)) + delta + fed
        else:
            h = self._add(self.attn_norm if self.cross is None else self.cross_norm, h, delta, self.skip_attn, ctx)
            mix_stats = merge_stats(mix_stats, ctx.measure("residual.attn", h))
            fed, feed_stats = self.feed(h, ctx)
            h = self._add(self.mlp_norm, h, fed, self.skip_mlp, ctx)
        h = constrain(h, "batch", "length", "embed_activation")
        return h, merge_stats(mix_stats, feed_stats, ctx.measure("residual", h)), cache

    def _before(self, norm: Norm | None, h: Delta) -> Delta:
        h = h if self.arrangement == "post" or norm is None else norm(h)
        return h.astype(self.dtype) if self.dtype else h

    def _after(self, norm: Norm | None, scale: Any, delta: Delta) -> Delta:
        delta = delta if norm is None else norm(delta)
        return delta if scale is None else delta * scale.get_value().astype(delta.dtype).reshape(1, 1, -1)

    def _add(self, norm: Norm | None, h: Delta, delta: Delta, skip: dict[str, Op], ctx: Context) -> Delta:
        total = dense(apply(skip, h, ctx)) + delta
        return norm(total) if self.arrangement == "post" and norm is not None else total
