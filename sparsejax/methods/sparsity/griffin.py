"""GRIFFIN: the hidden units that were large throughout a prompt decode what follows (Dong et al., 2024, arXiv 2404.01365).

"Prompt-prompted Adaptive Structured Pruning for Efficient LLM Generation". Acts on the FFN's hidden vector in all layers, see
`sequence_sets`. With z_t the hidden vector [F] of prompt token t:

    statistic_j = || (z_t,j / ||z_t||_2)_t ||_2         "normalised": a loud token counts no more than another

Variants: "raw" (not normalised), "max" over tokens. Published: half of the units, one set per layer and sequence; `shared` sums
over a batch, so that decoding it is a dense product of width k whatever its size.
Not here: the mode that masks the last token alone for classification.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax import plugs
from sparsejax.methods.sparsity.selection import Arrays
from sparsejax.methods.sparsity.sequence_sets import SequenceSet, SetPass
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check_choice

SCORES = ("normalised", "raw", "max")


@plugs.register("activation_op", "griffin")
@dataclass(frozen=True)
class GriffinSet(SequenceSet):
    """The units of the largest norm over the prompt."""

    fraction: float = 0.5
    score: str = "normalised"
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("griffin: score", self.score, SCORES)

    def statistic(self, arrays: Arrays, h: Float[Array, "B T F"], prompt: Bool[Array, "B T"]) -> Float[Array, "B F"]:
        if self.score == "normalised":
            h = h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-12)
        sizes = jnp.where(prompt[..., None], jnp.abs(h), 0)
        return jnp.max(sizes, axis=1) if self.score == "max" else jnp.linalg.norm(sizes, axis=1)


@plugs.register("pass", "griffin")
@dataclass
class Griffin(SetPass):
    """See `GriffinSet`."""

    score: str = "normalised"
    shared: bool = False

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        check_choice("score", self.score, SCORES)

    def op(self) -> str:
        return f"griffin:{1 - self.sparsity:.10g},score={self.score},shared={str(self.shared).lower()}"
