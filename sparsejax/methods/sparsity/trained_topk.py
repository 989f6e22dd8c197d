"""Trained top-k: a linear map sees only the largest entries of its input, from the first training step on.

Papers: "The lazy neuron phenomenon: on emergence of activation sparsity in Transformers" (Li et al., 2022, arXiv 2210.06313),
whose exact top-k stands behind ReLU; "Spark Transformer: reactivating sparsity in FFN and attention" (2025, arXiv 2506.06644),
whose top-k is statistical. An activation op for the input of any linear map; the papers' place is `blocks.*.mlp.down`, whose
input is the FFN's hidden vector h[..., F].

    topk        m = TopK_k(|h|) per token, exactly k, ties to the lowest index;             h' = m * h
    block_topk  m = the F / block * fraction blocks with the largest sum of h^2;            h' = m * h
    stat_topk   theta = mean(h) + std(h) * Phi^-1(1 - fraction), over F, float32;           h' = max(h - theta, 0)

k = max(1, round(fraction * F)) unless given. The mask is a constant of the backward pass: "masked" (the paper) gives dropped
entries no gradient, "straight_through" lets it reach them as if they had been kept (Q-Sparse, arXiv 2407.10969). Keeping all is
the dense op bit for bit: the input is returned as it came.
Published: k = 128 of F = 3072 (ViT-B/16), 8 % (Spark), 5 % (Gemma 3n's first layers). No published defaults for blocks.
Left out: approximate top-k on TPU, the papers' predictors of the mask, top-k in attention, and Q-Sparse's rescaling.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from sparsejax import plugs
from sparsejax.arrays import QuantizedActivation, SparseActivation, dense
from sparsejax.context import Context
from sparsejax.ops.selectors import block_topk_mask, check_fraction, kept_count, stat_topk, topk_mask

GRADIENTS = ("masked", "straight_through")
Operand = Array | QuantizedActivation | SparseActivation


@plugs.register("activation_op", "topk")
@dataclass(frozen=True)
class TopK:
    """The k entries of largest `score`: "magnitude", or the signed "value" (the same behind ReLU)."""

    fraction: float = 128 / 3072
    k: int = 0
    score: str = "magnitude"
    gradient: str = "masked"

    def __post_init__(self) -> None:
        check_fraction("topk", self.fraction)
        plugs.check(self.k >= 0, "topk: k", self.k, "must not be negative")
        plugs.check_choice("topk: score", self.score, ("magnitude", "value"))
        plugs.check_choice("topk: gradient", self.gradient, GRADIENTS)

    def validate(self, features: int, field: str) -> None:
        """Raise a ConfigError, naming `field`, unless k of `features` entries can be kept."""
        kept_count(features, self.fraction, self.k, f"{field}: topk.k")

    def __call__(self, x: Operand, ctx: Context) -> SparseActivation | Operand:
        """x[..., F] with its mask; x itself where k = F."""
        features = x.shape[-1]
        k = kept_count(features, self.fraction, self.k, "topk: k")
        if k == features:
            return x
        score = dense(x)
        return SparseActivation(x, topk_mask(jnp.abs(score) if self.score == "magnitude" else score, k), self.gradient)


@plugs.register("activation_op", "block_topk")
@dataclass(frozen=True)
class BlockTopK:
    """Whole blocks of `block` neighbouring entries, by their sum of squares: what a tiled kernel can skip."""

    fraction: float = 0.25
    block: int = 16
    gradient: str = "masked"

    def __post_init__(self) -> None:
        check_fraction("block_topk", self.fraction)
        plugs.check(self.block >= 1, "block_topk: block", self.block, "must be at least 1")
        plugs.check_choice("block_topk: gradient", self.gradient, GRADIENTS)

    def validate(self, features: int, field: str) -> None:
        """Raise a ConfigError, naming `field`, unless `block` divides `features`."""
        plugs.check(features % self.block == 0, f"{field}: block_topk.block", self.block, f"must divide the width {features}")

    def __call__(self, x: Operand, ctx: Context) -> SparseActivation | Operand:
        """x[..., F] with its mask; x itself where every block is kept."""
        features = x.shape[-1]
        self.validate(features, "activation_op")
        kept = kept_count(features // self.block, self.fraction)
        if kept * self.block == features:
            return x
        energy = jnp.square(dense(x).astype(jnp.float32))
        return SparseActivation(x, block_topk_mask(energy, kept, self.block), self.gradient)


@plugs.register("activation_op", "stat_topk")
@dataclass(frozen=True)
class StatTopK:
    """The soft threshold that keeps about `fraction` of a Gaussian row; its values are shifted by theta.

    `through_statistics`: the gradient passes through mean and std as well (the paper lets it).
    """

    fraction: float = 0.08
    through_statistics: bool = True

    def __post_init__(self) -> None:
        check_fraction("stat_topk", self.fraction)

    def validate(self, features: int, field: str) -> None:
        """Any width will do."""

    def __call__(self, x: Operand, ctx: Context) -> SparseActivation | Operand:
        """max(x - theta, 0) with its mask; x itself at fraction 1."""
        if self.fraction == 1:
            return x
        values = stat_topk(dense(x), 1 - self.fraction, through_statistics=self.through_statistics)
        return SparseActivation(values, values > 0)
