"""Transformers on one block: decoder, encoder, encoder-decoder, and classifiers of text or images.

`features` runs the stack and `logits` applies the head, so that a loss can apply the head piece by piece and never hold
B x T x V numbers at once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax import nnx_compat
from sparsejax.context import Context
from sparsejax.layers.embed import Embedding, PatchEmbedding
from sparsejax.layers.head import HeadTransform, pooled
from sparsejax.layers.linear import Init, Linear
from sparsejax.layers.norm import Norm
from sparsejax.layers.op import SiteRules
from sparsejax.layers.stack import Stack
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Module, Structure, weight
from sparsejax.ops.position_bias import relative_bias
from sparsejax.ops.rope import rope_tables
from sparsejax.plugs import check

Batch = dict[str, Any]


class Transformer(Module):
    """A model from a finalized config (`sparsejax.config.finalize`); every field of it is explained there.

    Text batches are the dicts of `sparsejax.data.pipeline`; image batches hold `images` [B, Y, X, C].
    """

    def __init__(self, config: ModelConfig, key: Array):
        self.config = _Static(config)
        rules = SiteRules.of(config)
        keys = jax.random.split(key, 5)
        causal = config.kind in ("decoder", "encoder_decoder")
        paired = config.kind == "encoder_decoder"
        self.embed: Any = (PatchEmbedding if config.kind == "vit" else Embedding)(config, key=keys[0])
        encoding: dict[str, Any] = dict(key=keys[1], site="encoder.blocks", rules=rules, causal=False)
        self.encoder = Stack(config, config.encoder_layers, **encoding) if paired else None
        self.encoder_norm = self._final_norm(config) if paired else None
        site = "decoder.blocks" if paired else "blocks"
        self.blocks = Stack(config, config.num_layers, key=keys[2], site=site, rules=rules, causal=causal, cross=paired)
        self.norm = self._final_norm(config)
        outputs = config.num_classes or config.vocab_size
        head: dict[str, Any] = dict(key=keys[3], site="head", axes=("embed", "vocab"), rules=rules, role="embedding")
        own_head = config.head and (config.num_classes or not config.tied_embeddings)
        init = Init.parse(config.init)
        self.head = Linear(config.d_model, outputs, init=init, bias=config.head_bias, **head) if own_head else None
        tied_bias = config.head_bias and not own_head
        self.head_bias = weight(jnp.zeros((outputs,), jnp.float32), ("vocab",), "bias") if tied_bias else None
        transform: dict[str, Any] = dict(key=jax.random.fold_in(keys[3], 1), rules=rules)
        self.head_transform = HeadTransform(config, **transform) if config.head_transform else None
        relative = config.positions.kind == "relative"
        self.relative_bias = self._bias_table(config, keys[4]) if relative else None
        self.encoder_bias = self._bias_table(config, jax.random.fold_in(keys[4], 1)) if relative and paired else None

    @staticmethod
    def _final_norm(config: ModelConfig) -> Norm | None:
        # A post-norm block ends with a norm already.
        return None if config.block == "post" else Norm(config.d_model, config.norm)

    @staticmethod
    def _bias_table(config: ModelConfig, key: Array) -> nnx_compat.Weight:
        shape = (config.positions.relative_buckets, config.attention.num_heads)
        return weight(jax.random.normal(key, shape) * config.d_model**-0.5, ("position", None), "embedding")

    def __call__(self, batch: Batch, ctx: Context = Context()) -> tuple[Float[Array, ...], dict[str, Any]]:
        """(float32 logits, stats): [B, T, V], or [B, classes] for a classifier."""
        h, stats, _ = self.features(batch, ctx)
        return self.logits(h), stats

    def features(
        self, batch: Batch, ctx: Context, cache: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any], dict[str, Any] | None]:
        """(h, stats, cache): what the head reads, [B, T, D] or pooled [B, D]; stats `{site: {name: Stat}}` over layers."""
        with nnx_compat.read_only():
            stats: dict[str, Any] = {}
            if self.encoder is not None and ctx.memory is None:
                ctx, stats = self.encode(batch, ctx)
            h, ctx = self._enter(batch, ctx, self.blocks_bias())
            h, found, cache = self.blocks(h, ctx, cache)
            prefix = "" if self.encoder is None else "decoder."
            stats = {**stats, **{f"{prefix}{site}": value for site, value in found.items()}}
            h = self._leave(self.norm, h)
            config = self.config.value
            return (pooled(h, ctx.token_mask, config.pool) if config.num_classes else h), stats, cache

    def logits(self, h: Float[Array, "... D"], ctx: Context = Context()) -> Float[Array, "... V"]:
        """float32 logits of the head, soft-capped if the config says so.

        Raises:
          ConfigError: the model ends with its hidden states, see `features`.
        """
        config = self.config.value
        check(config.head, "model.head", config.head, "this model has no output head; it gives hidden states")
        with nnx_compat.read_only():
            if self.head_transform is not None:
                h = self.head_transform(h, ctx)
            if config.head_scale != 1.0:
                h = h * jnp.asarray(config.head_scale, h.dtype)
            if self.head is None:
                logits = self.embed.attend(h)
            else:
                logits = self.head.product(self.head.encode(h, ctx), ctx, out_dtype=jnp.float32)
            if self.head_bias is not None:
                logits = logits + self.head_bias.get_value().astype(jnp.float32).reshape((1,) * (h.ndim - 1) + (-1,))
            cap = config.head_softcap
            return cap * jnp.tanh(logits / cap) if cap else logits

    def empty_cache(self, batch: int, length: int) -> dict[str, Any]:
        """A key-value cache without a token and with room for `length`, in the format of `model.attention.cache_format`."""
        return self.blocks.empty_cache(batch, length, jnp.dtype(self.config.value.dtype))

    def blocks_bias(self) -> Any:
        return None if self.relative_bias is None else self.relative_bias.get_value()

    def encode(self, batch: Batch, ctx: Context) -> tuple[Context, dict[str, Any]]:
        """(ctx, stats) of the encoder: its output travels on as `ctx.memory`, and `features` does not encode again."""
        assert self.encoder is not None
        source = {
            "tokens": batch["encoder_tokens"],
            "segment_ids": batch.get("encoder_segment_ids"),
            "positions": batch.get("encoder_positions"),
        }
        bias = None if self.encoder_bias is None else self.encoder_bias.get_value()
        h, inner = self._enter(source, ctx, bias, bidirectional=True)
        h, stats, _ = self.encoder(h, inner)
        h = self._leave(self.encoder_norm, h)
        ctx = ctx._replace(memory=h, memory_segment_ids=source["segment_ids"])
        return ctx, {f"encoder.{site}": value for site, value in stats.items()}

    def _leave(self, norm: Norm | None, h: Array) -> Array:
        """What is read after a stack: normalised, and no longer in the dtype of the residual stream."""
        config = self.config.value
        h = h if norm is None else norm(h)
        return h.astype(config.dtype) if config.residual_dtype else h

    def _enter(self, batch: Batch, ctx: Context, bias: Any, bidirectional: bool | None = None) -> tuple[Array, Context]:
        """Embed the batch and complete the context with what its layers share."""
        config = self.config.value
        if config.kind == "vit":
            return self.embed(batch["images"].astype(config.dtype), ctx), ctx._replace(segment_ids=None, positions=None)
        tokens = batch["tokens"]
        positions = batch.get("positions")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        h = self.embed(tokens, positions, batch.get("token_types"))
        ctx = ctx._replace(positions=positions, segment_ids=batch.get("segment_ids"), prefix=batch.get("prefix"))
        bidirectional = config.kind == "encoder" if bidirectional is None else bidirectional
        return h, ctx._replace(tables=shared_tables(config, positions, bias, bidirectional))


class _Static:
    """A finalized config as a static attribute: compared by what it says."""

    def __init__(self, value: ModelConfig):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(repr(self.value))


def abstract_transformer(config: ModelConfig) -> tuple[Structure, dict[str, Any]]:
    """Structure and ShapeDtypeStructs of a finalized config's model; nothing is allocated, equal configs share them."""
    return _abstract(_Static(config))


@functools.lru_cache(maxsize=16)  # post-training passes ask for the same few many times, a third of a second each
def _abstract(config: _Static) -> tuple[Structure, dict[str, Any]]:
    return nnx_compat.abstract(lambda: Transformer(config.value, jax.random.key(0)))


def shared_tables(config: ModelConfig, positions: Array, bias: Any, bidirectional: bool) -> dict[str, Any]:
    """Tensors that every layer reads and none should compute again."""
    tables: dict[str, Any] = {}
    if config.positions.kind == "rope":
        rope = config.positions.rope
        shared = dict(fraction=rope.fraction)
        head = config.attention.head_dim
        if "global" in config.attention_pattern:
            tables["rope.global"] = rope_tables(positions, head, theta=rope.theta, scaling=rope.scaling, **shared)
        if "local" in config.attention_pattern:
            local = rope.local_theta or rope.theta
            # A local theta goes with unscaled rotation (Gemma 3); with one theta both kinds are scaled alike.
            scaling = "none" if rope.local_theta else rope.scaling
            tables["rope.local"] = rope_tables(positions, head, theta=local, scaling=scaling, **shared)
    if bias is not None:
        tables["relative_bias"] = functools.partial(
            relative_bias, bias, bidirectional=bidirectional, max_distance=config.positions.relative_max_distance
        )
    return tables
