"""What enters the stack: token, position and type embeddings, and image patches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax.arrays import matmul
from sparsejax.layers.linear import Init, Linear
from sparsejax.layers.norm import Norm
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Module, weight
from sparsejax.ops.position_bias import interpolate_positions, sinusoidal_positions


class Embedding(Module):
    """Tokens to vectors: a table, then (by config) sqrt(D) scaling, learned or sinusoidal positions, token types and a norm."""

    def __init__(self, config: ModelConfig, *, key: Array):
        width, init = config.d_model, Init.parse(config.init)
        keys = jax.random.split(key, 3)

        def table(key: Array, rows: int, axis: str):
            return weight(jax.random.normal(key, (rows, width)) * (init.std or width**-0.5), (axis, "embed"), "embedding")

        self.table = table(keys[0], config.vocab_size, "vocab")
        self.sinusoidal = config.positions.kind == "sinusoidal"
        self.offset = config.positions.offset
        self.multiplier = width**0.5 if config.embedding_scale else 1.0
        learned = config.positions.kind == "learned"
        self.positions = table(keys[1], config.max_length + self.offset, "position") if learned else None
        self.types = table(keys[2], config.token_types, "position") if config.token_types else None
        self.norm = Norm(width, config.norm) if config.embedding_norm else None

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], types: Array | None = None) -> Array:
        table = self.table.get_value()
        # A gather from a table that is sharded over the vocabulary; out-of-range ids give NaN rather than a wrong row.
        x = table.at[tokens].get(mode="fill", fill_value=jnp.nan)
        if self.multiplier != 1.0:
            x = x * jnp.asarray(self.multiplier, x.dtype)
        if self.positions is not None:
            x = x + self.positions.get_value().at[positions + self.offset].get(mode="fill", fill_value=jnp.nan)
        if self.sinusoidal:
            x = x + sinusoidal_positions(positions, x.shape[-1]).astype(x.dtype)
        if self.types is not None:
            rows = self.types.get_value()
            x = x + (rows[0].reshape(1, 1, -1) if types is None else rows[types])
        return x if self.norm is None else self.norm(x)

    def attend(self, h: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits of a tied head, float32."""
        return matmul(h, self.table.get_value().T, out_dtype=jnp.float32)


class PatchEmbedding(Module):
    """Images to patch vectors with (by config) learned positions, interpolated when the image is not of the trained size."""

    def __init__(self, config: ModelConfig, *, key: Array):
        vision, width = config.vision, config.d_model
        keys = jax.random.split(key, 3)
        self.patch = vision.patch_size
        self.grid = vision.image_size // vision.patch_size
        features = vision.channels * self.patch**2
        self.project = Linear(
            features, width, key=keys[0], site="embed.patch", axes=("patch", "embed"), init=Init.parse(config.init), bias=True
        )
        token = weight(jax.random.normal(keys[1], (1, 1, width)) * 0.02, (None, None, "embed"), "embedding")
        self.class_token = token if vision.class_token else None
        count = self.grid**2 + int(vision.class_token)
        positions = weight(jax.random.normal(keys[2], (count, width)) * 0.02, ("position", "embed"), "embedding")
        self.positions = positions if config.positions.kind == "learned" else None

    def __call__(self, images: Float[Array, "B Y X C"], ctx) -> Float[Array, "B T D"]:
        batch, height, breadth, channels = images.shape
        rows, columns, size = height // self.patch, breadth // self.patch, self.patch
        patches = images.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
        x = self.project(patches.reshape(batch, rows * columns, size * size * channels), ctx)
        if self.class_token is not None:
            token = jnp.broadcast_to(self.class_token.get_value().astype(x.dtype), (batch, 1, x.shape[-1]))
            x = jnp.concatenate([token, x], axis=1)
        if self.positions is None:
            return x
        positions = self.positions.get_value()
        if (rows, columns) != (self.grid, self.grid):
            positions = interpolate_positions(
                positions, (self.grid, self.grid), (rows, columns), class_tokens=int(self.class_token is not None)
            )
        return x + positions.astype(x.dtype)[None]
