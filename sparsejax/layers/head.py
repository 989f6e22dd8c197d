"""What stands between the stack and the output head: pooling over tokens, and BERT's transform."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.context import Context
from sparsejax.layers.ffn import Nonlinearity
from sparsejax.layers.linear import Init, Linear
from sparsejax.layers.norm import Norm
from sparsejax.layers.op import SiteRules
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Module


def pooled(h: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None, how: str, *, normalized: bool = False) -> Array:
    """One vector [B, D] per example.

    Args:
      mask: False at padding; None where there is none.
      how: `class` (the first token's) | `mean` (over the tokens that are not padding).
      normalized: to length 1 (sentence embeddings).
    """
    if how == "class":
        vector = h[:, 0].astype(jnp.float32)
    elif mask is None:
        vector = jnp.mean(h.astype(jnp.float32), axis=1)
    else:
        counted = mask[..., None].astype(jnp.float32)
        vector = jnp.sum(h * counted, axis=1) / jnp.maximum(jnp.sum(counted, axis=1), 1.0)
    if normalized:
        vector = vector / jnp.maximum(jnp.linalg.norm(vector, axis=-1, keepdims=True), 1e-12)
    return vector.astype(h.dtype)


class HeadTransform(Module):
    """norm(activation(h W + b)), W [D, D]: what BERT's masked-token head applies first (Devlin et al., 2018, 1810.04805)."""

    def __init__(self, config: ModelConfig, *, key: Array, rules: SiteRules):
        width = config.d_model
        project = dict(key=key, site="head_transform.project", axes=("embed", None), rules=rules, bias=True)
        self.project = Linear(width, width, init=Init.parse(config.init), **project)  # type: ignore[arg-type]
        self.activation = Nonlinearity(config.ffn.activation, width)
        self.norm = Norm(width, config.norm)

    def __call__(self, h: Float[Array, "... D"], ctx: Context) -> Float[Array, "... D"]:
        return self.norm(self.activation(self.project(h, ctx)))
