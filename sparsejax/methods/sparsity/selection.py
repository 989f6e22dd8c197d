"""Which entries of a tensor flow on: one activation op per selector, for methods that are trained and that are fitted alike.

    y = (x * m) W,   m = select(score(x)),   score = |x| | x | |x| * c | |x - mu|
                                              c[in]: the weight of a channel; mu: what entries lie around; both fitted

    threshold   m = score > t, strictly; t a number, or one per channel, fitted
    topk        m = the k largest scores of each token, exactly k, ties to the lowest index; k = max(1, round(fraction * in))
    block_topk  m = the in / block * fraction blocks with the largest sum of squared scores
    n_of_m      m = the n largest of every m consecutive scores
    stat_topk   theta = mean(x) + std(x) * Phi^-1(1 - fraction), over channels, float32;      x' = max(x - theta, 0)

Papers: exact top-k behind ReLU is that of "The lazy neuron phenomenon" (Li et al., 2022, arXiv 2210.06313: k = 128 of 3072);
top-k of every input with a straight-through gradient that of Q-Sparse (arXiv 2407.10969), which also divides by the norm of
what is kept (`rescale`; the exact form is not published, ours keeps each token's norm); statistical top-k that of Spark
Transformer (arXiv 2506.06644: 8 %) and Gemma 3n (5 %). Thresholds, weights and k by layer are what TEAL, WINA, La RoSA fit.

The mask is a constant of the backward pass: "masked" gives dropped entries no gradient, "straight_through" lets it reach them
as if they had been kept. Keeping all is the dense op bit for bit. At tokens outside `ctx.sparsify` all is kept.
Fitted arrays are stacked over layers, so that layers with other thresholds or other k share one scanned program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax import plugs
from sparsejax.arrays import QuantizedActivation, SparseActivation, dense
from sparsejax.context import Context
from sparsejax.nnx_compat import Weight, weight
from sparsejax.ops.selectors import (
    block_topk_mask,
    check_fraction,
    kept_count,
    n_of_m_mask,
    stat_topk,
    threshold_mask,
    topk_mask,
)

GRADIENTS = ("masked", "straight_through")
SCORES = ("magnitude", "value", "weighted", "centred")
Operand = Array | QuantizedActivation | SparseActivation
Arrays = dict[str, Array]


def score_of(x: Operand, score: str, arrays: Arrays) -> Float[Array, "... in"]:
    """The score by which entries of x are chosen; `weighted` reads `arrays["scale"]` [in], `centred` `arrays["mean"]` []."""
    values = jax.lax.stop_gradient(dense(x))
    if score == "value":
        return values
    if score == "centred":
        return jnp.abs(values - along(arrays["mean"], values))
    magnitude = jnp.abs(values)
    return magnitude if score == "magnitude" else magnitude * along(arrays["scale"], magnitude)


def along(fitted: Array, x: Array) -> Array:
    """A fitted number or [in] in x's dtype, ready to broadcast with x[..., in]."""
    return fitted.astype(x.dtype).reshape((1,) * (x.ndim - fitted.ndim) + fitted.shape)


def fitted(features: int | None) -> Weight:
    """An array that calibration fills: [features], or a number."""
    shape, axes = ((), ()) if features is None else ((features,), (None,))
    return weight(jnp.zeros(shape, jnp.float32), axes, "fitted")


class Selector:
    """What the selectors share; subclasses are frozen dataclasses with fields `score` and `gradient`."""

    score: str
    gradient: str

    def __post_init__(self) -> None:
        name = type(self).__name__
        plugs.check_choice(f"{name}: score", self.score, SCORES)
        plugs.check_choice(f"{name}: gradient", self.gradient, GRADIENTS)

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """What calibration fits: the channels' weights, or the number that entries lie around, where the score has them."""
        if self.score == "centred":
            return {"mean": fitted(None)}
        return {"scale": fitted(shape[-2])} if self.score == "weighted" else {}

    def chosen(self, x: Operand, mask: Array, ctx: Context, most: int | None = None) -> SparseActivation:
        """x with its mask, whole at tokens out of scope; `most`: entries that a mask keeps at most, where that is known."""
        return SparseActivation(x, ctx.kept(mask), self.gradient, most if ctx.sparsify is None else None)


@plugs.register("activation_op", "threshold")
@dataclass(frozen=True)
class Threshold(Selector):
    """Scores above a fitted threshold; `channels`: one for each channel."""

    score: str = "magnitude"
    channels: bool = False
    gradient: str = "masked"

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """threshold [] or [in] (0: exact zeros are dropped; negative: all is kept), and the channels' weights."""
        return {"threshold": fitted(shape[-2] if self.channels else None), **super().parameters(shape, axes, key)}

    def __call__(self, arrays: Arrays, x: Operand, ctx: Context) -> SparseActivation:
        score = score_of(x, self.score, arrays)
        return self.chosen(x, threshold_mask(score, along(arrays["threshold"], score)), ctx)


@plugs.register("activation_op", "topk")
@dataclass(frozen=True)
class TopK(Selector):
    """The k entries of largest score.

    fitted: k is an array, `count`, so that it may differ between layers; fraction and k are not read then.
    rescale: divide by ||x * m|| / ||x||, so that a token keeps its norm.
    """

    fraction: float = 128 / 3072
    k: int = 0
    score: str = "magnitude"
    gradient: str = "masked"
    fitted: bool = False
    rescale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("topk", self.fraction)
        plugs.check(self.k >= 0, "topk: k", self.k, "must not be negative")

    def validate(self, features: int, field: str) -> None:
        """Raise a ConfigError, naming `field`, unless k of `features` entries can be kept."""
        kept_count(features, self.fraction, self.k, f"{field}: topk.k")

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """count [] (k as a float) where `fitted`, and the channels' weights."""
        count = {"count": fitted(None)} if self.fitted else {}
        return {**count, **super().parameters(shape, axes, key)}

    def __call__(self, *arguments: Any) -> SparseActivation | Operand:
        """`(x, ctx)`, or `(arrays, x, ctx)` where there are arrays: x[..., in] with its mask; x itself where k = in."""
        arrays, x, ctx = arguments if len(arguments) == 3 else ({}, *arguments)
        features = x.shape[-1]
        count: Any = kept_count(features, self.fraction, self.k, "topk: k")
        if self.fitted:
            count = jnp.clip(jnp.round(arrays["count"]), 1, features).astype(jnp.int32)
        elif count == features:
            return x
        most = None if self.fitted else count
        sparse = self.chosen(x, topk_mask(score_of(x, self.score, arrays), count), ctx, most)
        return _norm_kept(sparse) if self.rescale else sparse


@plugs.register("activation_op", "block_topk")
@dataclass(frozen=True)
class BlockTopK(Selector):
    """Whole blocks of `block` neighbouring entries, by their sum of squared scores: what a tiled kernel can skip."""

    fraction: float = 0.25
    block: int = 16
    score: str = "magnitude"
    gradient: str = "masked"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("block_topk", self.fraction)
        plugs.check(self.block >= 1, "block_topk: block", self.block, "must be at least 1")

    def validate(self, features: int, field: str) -> None:
        """Raise a ConfigError, naming `field`, unless `block` divides `features`."""
        plugs.check(features % self.block == 0, f"{field}: block_topk.block", self.block, f"must divide the width {features}")

    def __call__(self, *arguments: Any) -> SparseActivation | Operand:
        """As `TopK.__call__`; x itself where every block is kept."""
        arrays, x, ctx = arguments if len(arguments) == 3 else ({}, *arguments)
        features = x.shape[-1]
        self.validate(features, "activation_op")
        kept = kept_count(features // self.block, self.fraction)
        if kept * self.block == features:
            return x
        energy = jnp.square(score_of(x, self.score, arrays).astype(jnp.float32))
        return self.chosen(x, block_topk_mask(energy, kept, self.block), ctx, kept * self.block)


@plugs.register("activation_op", "n_of_m")
@dataclass(frozen=True)
class NofM(Selector):
    """The n largest scores of every m consecutive channels."""

    n: int = 8
    m: int = 16
    score: str = "magnitude"
    gradient: str = "masked"

    def __post_init__(self) -> None:
        super().__post_init__()
        plugs.check(1 <= self.n <= self.m, "n_of_m: n", self.n, f"must be 1 to m = {self.m}")

    def validate(self, features: int, field: str) -> None:
        """Raise a ConfigError, naming `field`, unless m divides `features`."""
        plugs.check(features % self.m == 0, f"{field}: n_of_m.m", self.m, f"must divide the width {features}")

    def __call__(self, *arguments: Any) -> SparseActivation | Operand:
        """As `TopK.__call__`; x itself where n = m."""
        arrays, x, ctx = arguments if len(arguments) == 3 else ({}, *arguments)
        if self.n == self.m:
            return x
        most = x.shape[-1] // self.m * self.n
        return self.chosen(x, n_of_m_mask(score_of(x, self.score, arrays), self.n, self.m), ctx, most)


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
        """max(x - theta, 0) with its mask; x itself at fraction 1, and at tokens out of scope."""
        if self.fraction == 1:
            return x
        whole = dense(x)
        values = stat_topk(whole, 1 - self.fraction, through_statistics=self.through_statistics)
        mask = ctx.kept(values > 0)
        return SparseActivation(values if ctx.sparsify is None else jnp.where(ctx.sparsify[..., None], values, whole), mask)


def _norm_kept(sparse: SparseActivation) -> SparseActivation:
    whole = dense(sparse.values).astype(jnp.float32)
    kept = jnp.sum(jnp.square(jnp.where(sparse.mask, whole, 0)), axis=-1, keepdims=True)
    factor = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(jnp.square(whole), axis=-1, keepdims=True) / jnp.maximum(kept, 1e-30)))
    return replace(sparse, values=(whole * factor).astype(sparse.dtype))
