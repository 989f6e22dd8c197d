"""A stack of blocks as segments (a period of blocks, repeated), each scanned over its repeats.

Layers that alternate (local and global, dense and expert) keep the scan; a rule that singles out a layer splits the segments.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.context import Context, Stat
from sparsejax.layers.block import Block
from sparsejax.layers.op import SiteRules
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Module, data

# What the backward pass may keep; the rest is recomputed.
REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

Segment = tuple[int, int]


def plan_segments(signatures: list[Any]) -> list[Segment]:
    """Cover the layers' signatures with (period, repeats), longest cover first, shortest period among equals."""
    segments: list[Segment] = []
    start = 0
    while start < len(signatures):
        left = len(signatures) - start
        candidates = [(period, _repeats(signatures, start, period)) for period in range(1, left + 1)]
        # A period of its own length covers everything once: only worth it where nothing repeats.
        period, repeats = max(candidates, key=lambda c: (c[0] * c[1] if c[1] > 1 else 1, -c[0]))
        segments.append((period, repeats))
        start += period * repeats
    return segments


def _repeats(signatures: list[Any], start: int, period: int) -> int:
    first = signatures[start : start + period]
    count = 1
    while signatures[start + count * period : start + (count + 1) * period] == first:
        count += 1
    return count


class Stack(Module):
    """`num_layers` blocks at sites `SITE.0`, `SITE.1`, ..."""

    def __init__(
        self,
        config: ModelConfig,
        num_layers: int,
        *,
        key: Array,
        site: str,
        rules: SiteRules,
        causal: bool,
        cross: bool = False,
    ):
        self.residual_dtype = config.residual_dtype
        self.unroll, self.remat = config.unroll, config.remat
        keys = jax.random.split(key, num_layers)

        def block(layer: int, key: Array) -> Block:
            return Block(
                config,
                key=key,
                site=f"{site}.{layer}",
                rules=rules,
                attention=config.attention_pattern[layer % len(config.attention_pattern)],
                feed=config.feed_pattern[layer % len(config.feed_pattern)],
                causal=causal,
                cross=cross,
            )

        signatures = _signatures(block, keys, config, rules) if config.scan else list(range(num_layers))
        self.plan = tuple(plan_segments(signatures)) if config.scan else ((num_layers, 1),)
        segments: dict[str, Any] = {}
        start = 0
        for index, (period, repeats) in enumerate(self.plan):
            slots = {}
            for slot in range(period):
                chosen = keys[start + slot : start + period * repeats : period]
                slots[str(slot)] = jax.vmap(lambda k, layer=start + slot: block(layer, k))(chosen)
            segments[str(index)] = slots
            start += period * repeats
        self.segments = data(segments)

    def __call__(
        self, h: Float[Array, "B T D"], ctx: Context, cache: dict[str, Any] | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Any], dict[str, Any] | None]:
        """(h, stats stacked over the layers that report them, cache)."""
        h = h.astype(self.residual_dtype) if self.residual_dtype else h
        found: list[tuple[np.ndarray, dict[str, Any]]] = []
        new_cache: dict[str, Any] = {}
        start = 0
        for index, (period, repeats) in enumerate(self.plan):
            slots = self.segments[str(index)]
            layers = start + np.arange(repeats)[:, None] * period + np.arange(period)
            h, stats, new_cache[str(index)] = self._run_segment(h, slots, layers, ctx, cache and cache[str(index)])
            found += [(layers[:, slot], stats[str(slot)]) for slot in range(period)]
            start += period * repeats
        return h, _gather_layers(found), None if cache is None else new_cache

    def _run_segment(self, h: Array, slots: Any, layers: np.ndarray, ctx: Context, cache: Any) -> tuple[Array, Any, Any]:
        repeats, period = layers.shape
        unroll = min(repeats, self.unroll or default_unroll(repeats))

        def body(h: Array, xs: Any) -> tuple[Array, Any]:
            blocks, layer, cached = xs
            stats, kept = {}, {}
            for slot in range(period):
                name = str(slot)
                here = ctx._replace(layer=layer[slot])
                h, stats[name], kept[name] = blocks[name](h, here, None if cached is None else cached[name])
            return h, (stats, None if cached is None else kept)

        if self.remat != "none":
            # Inside a rolled loop nothing can be merged across iterations, so the CSE barrier would only cost time.
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=unroll == repeats)
        if repeats > 1:
            h, (stats, kept) = jax.lax.scan(body, h, (slots, jnp.asarray(layers), cache), unroll=unroll)
            return h, stats, kept
        # Without a scan: around a cache, the axis of length 1 makes XLA write each update twice and copy the cache for it.
        h, (stats, kept) = body(h, (jax.tree.map(lambda a: a[0], slots), jnp.asarray(layers[0]), cache))
        return h, jax.tree.map(lambda a: a[None], stats), kept

    def empty_cache(self, batch: int, length: int, dtype: Any) -> dict[str, Any]:
        """Caches without a token, with room for `length` of them; stacked as the blocks are where a segment repeats."""
        caches: dict[str, Any] = {}
        for index, (period, repeats) in enumerate(self.plan):
            slots = self.segments[str(index)]
            ones = {str(s): slots[str(s)].attn.empty_cache(batch, length, dtype) for s in range(period)}
            stacked = jax.tree.map(lambda a, n=repeats: jnp.broadcast_to(a, (n, *a.shape)), ones)
            caches[str(index)] = stacked if repeats > 1 else ones
        return caches


def default_unroll(repeats: int) -> int:
    """Layers per scan step. A rolled scan costs 31 % of a step on CPU at six layers, a long unrolled one seconds."""
    if jax.default_backend() != "cpu":
        return 1
    return max(n for n in range(1, 7) if repeats % n == 0)


def _signatures(block: Any, keys: Array, config: ModelConfig, rules: SiteRules) -> list[Any]:
    """What distinguishes layers: their place in the patterns and, where a rule names layers, the ops it puts there."""
    cycle = math.lcm(len(config.attention_pattern), len(config.feed_pattern))
    if not rules:
        cycle_of = [
            (config.attention_pattern[i % len(config.attention_pattern)], config.feed_pattern[i % len(config.feed_pattern)])
            for i in range(cycle)
        ]
        return [cycle_of[layer % cycle] for layer in range(len(keys))]
    return [
        jax.tree.structure(jax.eval_shape(lambda k, layer=layer: block(layer, k), keys[layer])) for layer in range(len(keys))
    ]


def _gather_layers(found: list[tuple[np.ndarray, dict[str, Any]]]) -> dict[str, Any]:
    """Join the slots' stacked statistics into one array per statistic, in layer order.

    Where layers differ in shape (a dense and an expert FFN of other widths) the smaller ones are filled up with nan.
    """
    joined: dict[str, Any] = {}
    for site in sorted({site for _, stats in found for site in stats}):
        joined[site] = {}
        for name in sorted({name for _, stats in found for name in stats.get(site, {})}):
            parts = [(layers, stats[site][name]) for layers, stats in found if name in stats.get(site, {})]
            order = np.argsort(np.concatenate([layers for layers, _ in parts]))
            values = jnp.concatenate(_padded([stat.value for _, stat in parts]))
            joined[site][name] = Stat(
                values if (order == np.arange(len(order))).all() else values[order], parts[0][1].reduction
            )
    return joined


def _padded(values: list[Array]) -> list[Array]:
    shape = tuple(max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True))
    return [
        jnp.pad(
            value,
            [(0, 0), *((0, whole - size) for whole, size in zip(shape, value.shape[1:], strict=True))],
            constant_values=jnp.nan,
        )
        if value.shape[1:] != shape
        else value
        for value in values
    ]
