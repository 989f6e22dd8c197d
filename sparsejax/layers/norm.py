"""RMSNorm and LayerNorm, computed in float32 whatever the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.models.config import NormConfig
from sparsejax.nnx_compat import Module, weight


class Norm(Module):
    """y = x / rms(x) * gain, or (x - mean) / std * gain + bias; `plus_one` makes the gain 1 + w (Gemma)."""

    def __init__(self, features: int, config: NormConfig, *, axis: str | None = "embed"):
        self.kind, self.epsilon, self.plus_one = config.kind, config.epsilon, config.plus_one
        zeros = jnp.zeros((features,), jnp.float32)
        start = zeros if config.plus_one else zeros + 1.0
        self.gain = weight(start, (axis,), "norm") if config.kind != "none" else None
        self.bias = weight(zeros, (axis,), "norm") if config.kind == "layer" and config.bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        if self.gain is None:
            return x
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        gain = self.gain.get_value()
        wide = wide * _align(gain + 1.0 if self.plus_one else gain, wide)
        if self.bias is not None:
            wide = wide + _align(self.bias.get_value(), wide)
        return wide.astype(x.dtype)


def _align(vector: Array, like: Array) -> Array:
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
