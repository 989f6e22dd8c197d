"""DoRA: the direction of a weight is adapted by LoRA, its magnitude by itself (Liu et al., 2024, arXiv 2402.09353).

    W' = (1 + d) |W| V / |V|,   V = W + (alpha / r) A B          |.| the norm of each output's column: [out]

The paper's magnitude vector m starts at |W|; ours is written m = (1 + d) |W| with d = 0, which is the same while W is frozen
and needs no weights to start from. As in the paper |V| is a constant of the backward pass. |V|^2 is taken as
|W|^2 + 2 <W, A B> + |A B|^2 in products of rank r: no matrix [in, out] is formed for it, and while B = 0 the factor
(1 + d) |W| / |V| is 1 and the model the base, bit for bit. The columns are the outputs', as in the released code.
A packed W gets the factor in its scales. Published: r = 4 to 64, alpha = 2 r, on q, k, v, up and down.
The gradient of d costs a product as large as that of a weight's gradient.
Not here: dropout; weights made of others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.arrays import LowRank, QTensor, Sum, dense
from sparsejax.context import Context
from sparsejax.methods.peft.lora import Lora
from sparsejax.nnx_compat import Weight, weight
from sparsejax.plugs import check, register

LEAST_SQUARE = 1e-30


@register("weight_op", "dora")
@dataclass(frozen=True)
class Dora(Lora):
    """rank, alpha: as in `Lora`."""

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """Those of LoRA, and magnitude [*lead, out], d above."""
        magnitude = weight(jnp.zeros((*shape[:-2], shape[-1]), jnp.float32), (*axes[:-2], axes[-1]), "adapter")
        return {**super().parameters(shape, axes, key), "magnitude": magnitude}

    def __call__(self, arrays: dict[str, Array], w: Any, ctx: Context) -> Sum:
        packed = isinstance(w, QTensor) and w.surrogate is None
        check(packed or isinstance(w, jax.Array), "dora", type(w).__name__, "acts on a plain or packed weight; put it first")
        update = self.update(arrays)
        factor = (1 + arrays["magnitude"].astype(jnp.float32)) * norm_ratio(dense(w), update)
        factor = factor[..., None, :]
        # In float32: bfloat16 has no number between 1 and 1.008.
        scaled = w.scaled(factor) if packed else (w * factor).astype(w.dtype)
        return Sum(scaled, LowRank(update.a, (update.b * factor).astype(update.b.dtype)))


def norm_ratio(w: Float[Array, "*lead in out"], update: LowRank) -> Float[Array, "*lead out"]:
    """|w| / |w + update| by column, float32, exactly 1 where the update is zero; no gradient."""
    w, a, b = (jax.lax.stop_gradient(v.astype(jnp.float32)) for v in (w, update.a, update.b))
    before = jnp.sum(jnp.square(w), axis=-2)
    a_t = jnp.swapaxes(a, -1, -2)
    change = jnp.sum(b * (2 * (a_t @ w) + (a_t @ a) @ b), axis=-2)
    return jnp.sqrt(jnp.maximum(before, LEAST_SQUARE) / jnp.maximum(before + change, LEAST_SQUARE))
