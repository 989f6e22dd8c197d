"""LoRA: low-rank adaptation of frozen weights (Hu et al., 2021, arXiv 2106.09685).

Acts on the weight of a linear map, in front of whatever multiplies it:

    y = x W + (alpha / r) (x A) B          W [in, out] of any weight type, A [in, r], B [r, out]

A is drawn from N(0, 1 / in) and B is zero, so that the model is the base, bit for bit, until the first step. The two products
are never added into a weight while training, so W may be packed. Published: r = 1 to 64, alpha a constant (r itself for GPT-3),
on q and v; on every linear map in most later work.
Train with `optimizer.train = ("adapter",)`; fold into the weights with the recipe `configs/recipes/merge_adapters.py`.
Not here: dropout on x of the second product, which a weight op does not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparsejax.arrays import LowRank, Sum
from sparsejax.context import Context
from sparsejax.nnx_compat import Weight, weight
from sparsejax.plugs import check, register


@register("weight_op", "lora")
@dataclass(frozen=True)
class Lora:
    """rank: r; alpha: the scale's numerator."""

    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        check(self.rank >= 1, "lora: rank", self.rank, "must be at least 1")
        check(self.alpha > 0, "lora: alpha", self.alpha, "must be positive")

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """a [*lead, in, r] and b [*lead, r, out]."""
        *lead, features, outputs = shape
        *lead_axes, entering, leaving = axes
        a = jax.random.normal(key, (*lead, features, self.rank), jnp.float32) * features**-0.5
        b = jnp.zeros((*lead, self.rank, outputs), jnp.float32)
        return {"a": weight(a, (*lead_axes, entering, None), "adapter"), "b": weight(b, (*lead_axes, None, leaving), "adapter")}

    def update(self, arrays: dict[str, Array]) -> LowRank:
        """What is added to the weight."""
        return LowRank(arrays["a"], arrays["b"] * (self.alpha / self.rank))

    def __call__(self, arrays: dict[str, Array], w: Any, ctx: Context) -> Sum:
        return Sum(w, self.update(arrays))
