"""Which entries of a score are kept: boolean masks of exactly stated size, and the statistical soft threshold.

All act on the last axis and accept any leading axes. Masks carry no gradient. Every selector orders by value alone: +0 and -0
tie, ties go to the lowest index, and NaN ranks above +inf, so that a bad score is kept and stays visible. Keeping everything
(k = F, n = m, sparsity = 0) returns a constant mask or the input itself, without computing anything.

The k largest are found by building the bits of the k-th value from the top, one count per row and bit, not by sorting: on CPU
`lax.top_k` runs on one thread and grows with k. Milliseconds, float32 on two cores, this against `lax.top_k`: [2048, 1024] with
k = 8: 7 and 9, k = 51: 6 and 27, k = 768: 6 and 170; [2048, 128] with k = 51: 2 and 11. Ties at the k-th value add up to half
as much; 16-bit scores need half the counts. On GPU and TPU the counts are plain row reductions (neither was measured). Where
features are sharded a count is an all-reduce of one number per row, and a sort would gather the row.
"""

from __future__ import annotations

from statistics import NormalDist

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.plugs import ConfigError, check


def check_fraction(name: str, fraction: float) -> None:
    """Raise a ConfigError, naming `name`, unless 0 < fraction <= 1."""
    check(0 < fraction <= 1, f"{name}: fraction", fraction, "0 < fraction <= 1")


def kept_count(features: int, fraction: float, k: int = 0, field: str = "k") -> int:
    """k if it is given, else max(1, round(fraction * features)); ConfigError unless 1 <= k <= features."""
    if k > features:
        raise ConfigError(f"{field} = {k}: larger than the {features} that there are to choose from")
    return k or max(1, round(fraction * features))


def topk_mask(score: Float[Array, "... F"], k: int | Int[Array, ""]) -> Bool[Array, "... F"]:
    """True at the k largest entries of each row, exactly k of them; equal scores are kept from the lowest index on.

    Args:
      score: float of any width; NaN counts as the largest.
      k: entries kept per row, 1 <= k <= F; may be traced.
    Raises:
      ConfigError: a k that is a number, outside its range.
    """
    features = score.shape[-1]
    if isinstance(k, int):
        check(1 <= k <= features, "k", k, f"1 to {features}, the width of the score")
        if k == features:
            return jnp.ones(score.shape, bool)
    image = _ordered(score)
    threshold = _kth_largest(image, k)
    above, tied = image > threshold, image == threshold
    missing = k - _row_count(above)
    too_many = jnp.any(_row_count(tied) > missing)
    return above | jax.lax.cond(too_many, lambda: _lowest_indices(tied, missing), lambda: tied)


def block_topk_mask(score: Float[Array, "... F"], k_blocks: int, block: int) -> Bool[Array, "... F"]:
    """True in the k_blocks contiguous blocks of `block` entries whose scores have the largest sums (taken in float32).

    Raises:
      ConfigError: `block` does not divide F, or k_blocks is outside 1 to F / block.
    """
    features = score.shape[-1]
    check(block >= 1 and features % block == 0, "block", block, f"must divide the width of the score, {features}")
    blocks = score.reshape(*score.shape[:-1], features // block, block)
    kept = topk_mask(jnp.sum(_wide(blocks), axis=-1), k_blocks)
    return jnp.broadcast_to(kept[..., None], blocks.shape).reshape(score.shape)


def n_of_m_mask(score: Float[Array, "... F"], n: int, m: int) -> Bool[Array, "... F"]:
    """True at the n largest of every m consecutive entries, exactly n of them; ties to the lowest index.

    Raises:
      ConfigError: m does not divide F, or n is outside 1 to m.
    """
    features = score.shape[-1]
    check(m >= 1 and features % m == 0, "m", m, f"must divide the width of the score, {features}")
    check(1 <= n <= m, "n", n, f"1 to m = {m}")
    if n == m:
        return jnp.ones(score.shape, bool)
    image = _ordered(score).reshape(*score.shape[:-1], features // m, m)
    position = jnp.arange(m).reshape((1,) * (image.ndim - 1) + (m,))
    rank = jnp.zeros(image.shape, jnp.int32)
    for other in range(m):
        rival = image[..., other : other + 1]
        rank += ((rival > image) | ((rival == image) & (position > other))).astype(jnp.int32)
    return (rank < n).reshape(score.shape)


def threshold_mask(score: Float[Array, "... F"], threshold: Array | float) -> Bool[Array, "... F"]:
    """score > threshold, strictly: an exact zero is dropped at threshold 0. The threshold is a scalar or broadcasts."""
    return jax.lax.stop_gradient(score) > threshold


def stat_topk(x: Float[Array, "... F"], sparsity: float, *, through_statistics: bool = True) -> Float[Array, "... F"]:
    """max(x - theta, 0), theta = mean(x) + std(x) * Phi^-1(sparsity): about F * (1 - sparsity) entries stay if x is Gaussian.

    The soft threshold of Spark Transformer (arXiv 2506.06644) and Gemma 3n; mean and biased std over the last axis in float32.

    Args:
      sparsity: expected share of zeros, in [0, 1); 0 returns x itself.
      through_statistics: whether the gradient passes through mean and std too.
    """
    check(0 <= sparsity < 1, "sparsity", sparsity, "0 <= sparsity < 1")
    if sparsity == 0:
        return x
    wide = _wide(x)
    observed = wide if through_statistics else jax.lax.stop_gradient(wide)
    mean = jnp.mean(observed, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(observed - mean), axis=-1, keepdims=True)
    # sqrt has an infinite slope at 0, and padding rows are constant.
    varies = variance > 0
    std = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 0)
    return jax.nn.relu(wide - (mean + std * NormalDist().inv_cdf(sparsity))).astype(x.dtype)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _ordered(score: Array) -> Array:
    """Signed integers in the order of the floats, of the same width: -0 as +0, every NaN the largest."""
    kind = jnp.dtype(f"int{8 * score.dtype.itemsize}")
    score = jax.lax.stop_gradient(score)
    largest = jnp.iinfo(kind).max
    bits = jax.lax.bitcast_convert_type(score, kind)
    image = jnp.where(bits < 0, bits ^ largest, bits)
    return jnp.where(jnp.isnan(score), largest, jnp.where(image == -1, 0, image))


def _row_count(mask: Bool[Array, "... F"]) -> Int[Array, "... 1"]:
    # XLA's CPU row reduction does about one entry per cycle. Adding eight slices first vectorizes, and halves the time; so does
    # a float32 sum (exact below 2 ** 24) over an int32 one.
    features = mask.shape[-1]
    partial = mask.astype(jnp.int32)
    if features % 8 == 0:
        partial = sum(jnp.split(partial, 8, axis=-1), start=jnp.zeros((), jnp.int32))
    exact = jnp.float32 if features < 1 << 24 else jnp.int32
    return jnp.sum(partial.astype(exact), axis=-1, keepdims=True).astype(jnp.int32)


def _kth_largest(image: Int[Array, "... F"], k: int | Array) -> Int[Array, "... 1"]:
    """The largest value that at least k entries of the row reach: its sign, then its bits from the top."""
    limits = jnp.iinfo(image.dtype)
    one = jnp.ones((), image.dtype)

    def add_bit(index: Array, floor: Array) -> Array:
        candidate = floor | (one << (limits.bits - 2 - index).astype(image.dtype))
        return jnp.where(_row_count(image >= candidate) >= k, candidate, floor)

    floor = jnp.where(_row_count(image >= 0) >= k, 0 * one, limits.min * one)
    return jax.lax.fori_loop(0, limits.bits - 1, add_bit, floor)


def _lowest_indices(tied: Bool[Array, "... F"], count: Int[Array, "... 1"]) -> Bool[Array, "... F"]:
    """The first `count` True entries of each row. A cumulative sum costs ten of these counts on CPU."""
    index = jax.lax.broadcasted_iota(jnp.int32, tied.shape, tied.ndim - 1)
    width = tied.shape[-1].bit_length()

    def add_bit(step: Array, cut: Array) -> Array:
        candidate = cut | (1 << (width - 1 - step))
        return jnp.where(_row_count(tied & (index < candidate)) <= count, candidate, cut)

    return tied & (index < jax.lax.fori_loop(0, width, add_bit, jnp.zeros(count.shape, jnp.int32)))
