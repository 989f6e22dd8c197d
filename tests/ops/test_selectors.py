"""Selectors against sorting in numpy, on values with ties, zeros of both signs, infinities and NaN."""

from statistics import NormalDist

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from sparsejax.ops.selectors import block_topk_mask, kept_count, n_of_m_mask, stat_topk, threshold_mask, topk_mask
from sparsejax.plugs import ConfigError

FEW_VALUES = st.sampled_from([-np.inf, -2.0, -1.0, -1e-45, -0.0, 0.0, 1e-45, 0.5, 1.0, 1.0000001, 3e38, np.inf])
# Few shapes and few k: each pair is a compilation, the contents are not.
KEPT = st.sampled_from([1, 5, 23])
TOPK = jax.jit(topk_mask, static_argnums=1)
N_OF_M = jax.jit(n_of_m_mask, static_argnums=(1, 2))
BLOCKS = jax.jit(block_topk_mask, static_argnums=(1, 2))


def sorted_mask(score, k):
    """The oracle: a stable descending sort, so that ties go to the lowest index."""
    order = np.argsort(-score.astype(np.float64), axis=-1, kind="stable")[..., :k]
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@given(score=hnp.arrays(np.float32, (3, 24), elements=FEW_VALUES), k=KEPT)
def test_topk_keeps_exactly_k_and_breaks_ties_to_the_lowest_index(score, k):
    mask = np.asarray(TOPK(score, k))
    assert (mask.sum(-1) == k).all()
    np.testing.assert_array_equal(mask, sorted_mask(score, k))


@given(score=hnp.arrays(np.float32, (3, 24), elements=st.floats(width=32, allow_nan=False)), k=KEPT)
def test_topk_agrees_with_a_sort_on_any_float32(score, k):
    np.testing.assert_array_equal(TOPK(score, k), sorted_mask(score, k))


CASES = [("float32", (4, 1024), 51), ("bfloat16", (4, 1024), 51), ("float16", (2, 3, 13), 12)]


@pytest.mark.parametrize("dtype, shape, k", CASES)
def test_topk_agrees_with_lax_top_k_in_every_width_of_float(dtype, shape, k):
    score = jnp.asarray(normal(*shape)).astype(dtype)
    chosen = np.asarray(jax.lax.top_k(score, k)[1])
    expected = np.zeros(shape, bool)
    np.put_along_axis(expected, chosen, True, axis=-1)
    np.testing.assert_array_equal(TOPK(score, k), expected)


def test_topk_of_float64_tells_values_apart_that_float32_merges():
    with jax.enable_x64(True):
        score = jnp.asarray([1.0, 1.0 + 1e-12, 1.0 - 1e-12, 1.0], jnp.float64)
        np.testing.assert_array_equal(TOPK(score, 2), [True, True, False, False])


def test_fewer_than_k_positive_entries_fill_up_from_the_first_zeros():
    rectified = np.zeros((3, 24), np.float32)
    rectified[:, [1, 2]] = -0.0
    rectified[:, [7, 20]] = 2.0
    np.testing.assert_array_equal(np.flatnonzero(TOPK(rectified, 5)[1]), [0, 1, 2, 7, 20])


def test_nan_of_either_sign_ranks_above_infinity_and_is_kept():
    score = np.zeros((3, 24), np.float32)
    score[:, 9], score[:, 3], score[:, 15] = np.nan, np.inf, np.array(0xFFC00000, np.uint32).view(np.float32)
    np.testing.assert_array_equal(np.flatnonzero(TOPK(score, 1)[0]), [9])
    np.testing.assert_array_equal(np.flatnonzero(TOPK(score, 5)[2]), [0, 1, 3, 9, 15])


def test_permuting_the_score_permutes_the_mask():
    score, order = normal(5, 64), np.random.default_rng(1).permutation(64)
    np.testing.assert_array_equal(TOPK(score[:, order], 9), np.asarray(TOPK(score, 9))[:, order])


def test_topk_is_the_same_under_vmap_scan_and_remat():
    score = np.round(normal(3, 4, 24) * 2)

    @jax.jit
    def transformed(s):
        scanned = jax.lax.scan(lambda carry, row: (carry, topk_mask(row, 5)), 0, s)[1]
        rematted = jax.grad(jax.checkpoint(lambda v: jnp.sum(jnp.where(topk_mask(v, 5), v, 0))))(s)
        return jax.vmap(lambda row: topk_mask(row, 5))(s), scanned, rematted

    for result in transformed(score):
        np.testing.assert_array_equal(result, sorted_mask(score, 5))


def test_topk_with_sharded_features_equals_one_device():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "tensor"))
    score = np.round(normal(4, 64) * 3)
    np.testing.assert_array_equal(TOPK(jax.device_put(score, sharding), 10), sorted_mask(score, 10))


def test_masks_carry_no_gradient():
    score = jnp.asarray(normal(2, 16))

    def sum_of_masks(s):
        masks = topk_mask(s, 3), n_of_m_mask(s, 2, 4), block_topk_mask(s, 1, 4), threshold_mask(s, 0.1)
        return sum(jnp.sum(mask * 3.0) for mask in masks)

    np.testing.assert_array_equal(jax.jit(jax.grad(sum_of_masks))(score), 0)


@pytest.mark.parametrize("k", [0, -1, 17])
def test_k_outside_the_width_is_refused(k):
    with pytest.raises(ConfigError, match="16"):
        topk_mask(jnp.zeros((2, 16)), k)


def test_keeping_everything_is_a_constant_mask():
    text = jax.make_jaxpr(lambda s: (topk_mask(s, 8), n_of_m_mask(s, 4, 4), block_topk_mask(s, 2, 4)))(jnp.zeros((2, 8)))
    assert not {"while", "scan", "cond", "sort", "top_k"} & {equation.primitive.name for equation in text.eqns}
    assert all(bool(mask.all()) for mask in (topk_mask(jnp.zeros((2, 8)), 8), n_of_m_mask(jnp.zeros((2, 8)), 4, 4)))


@given(score=hnp.arrays(np.float32, (3, 24), elements=FEW_VALUES), group=st.sampled_from([(2, 4), (1, 3), (5, 8)]))
def test_n_of_m_keeps_the_n_largest_of_every_group(score, group):
    n, m = group
    expected = sorted_mask(score.reshape(3, 24 // m, m), n).reshape(score.shape)
    np.testing.assert_array_equal(N_OF_M(score, n, m), expected)


@given(score=hnp.arrays(np.float32, (2, 3, 24), elements=st.integers(-3, 3)), size=st.sampled_from([(3, 1), (2, 4), (1, 12)]))
def test_block_topk_keeps_the_blocks_with_the_largest_sums(score, size):
    kept, block = size
    sums = score.reshape(2, 3, 24 // block, block).sum(-1)
    np.testing.assert_array_equal(BLOCKS(score, kept, block), np.repeat(sorted_mask(sums, kept), block, axis=-1))


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="block = 5.*12"):
        block_topk_mask(jnp.zeros((12,)), 1, 5)
    with pytest.raises(ConfigError, match="m = 5.*12"):
        n_of_m_mask(jnp.zeros((12,)), 1, 5)
    with pytest.raises(ConfigError, match="n = 5"):
        n_of_m_mask(jnp.zeros((12,)), 5, 4)


def test_threshold_is_strict_and_may_differ_per_unit():
    np.testing.assert_array_equal(threshold_mask(jnp.asarray([-1.0, 0.0, 1e-30]), 0.0), [False, False, True])
    np.testing.assert_array_equal(threshold_mask(jnp.asarray([[1.0, 1.0]]), jnp.asarray([[0.5, 1.0]])), [[True, False]])


def test_kept_count_rounds_and_never_keeps_nothing():
    assert kept_count(3072, 128 / 3072) == 128
    assert kept_count(10, 0.01) == 1
    assert kept_count(10, 1.0) == 10
    assert kept_count(10, 0.5, k=3) == 3
    with pytest.raises(ConfigError, match="ffn.k = 11.*10"):
        kept_count(10, 0.5, k=11, field="ffn.k")


@pytest.mark.parametrize("density", [0.5, 0.1, 0.05])
def test_statistical_topk_keeps_the_stated_share_of_a_gaussian(density):
    kept = np.asarray(stat_topk(jnp.asarray(normal(1000, 1536)), 1 - density)) > 0
    assert abs(kept.mean() - density) < 0.01 * density


def test_statistical_topk_is_the_published_formula_with_biased_std():
    x = normal(3, 5, 40)
    wide = x.astype(np.float64)
    theta = wide.mean(-1, keepdims=True) + wide.std(-1, keepdims=True) * NormalDist().inv_cdf(0.9)
    np.testing.assert_allclose(stat_topk(jnp.asarray(x), 0.9), np.maximum(wide - theta, 0), atol=1e-6)


@given(scale=st.floats(0.1, 10), shift=st.floats(-3, 3))
def test_statistical_topk_keeps_the_same_entries_after_shift_and_scale(scale, shift):
    x = normal(4, 256)
    before, after = (np.asarray(stat_topk(jnp.asarray(v, jnp.float32), 0.9)) for v in (x, scale * x + shift))
    clear = np.abs(before) > 1e-4
    assert ((after > 0) == (before > 0))[clear | (before == 0)].mean() > 0.999
    np.testing.assert_allclose(after, scale * before, atol=1e-4 * max(1, scale, abs(shift)))


def test_statistical_topk_of_half_has_the_mean_as_threshold():
    x = normal(4, 64)
    np.testing.assert_allclose(stat_topk(jnp.asarray(x), 0.5), np.maximum(x - x.mean(-1, keepdims=True), 0), atol=1e-6)


def test_statistical_topk_has_the_closed_form_mean():
    quantile = NormalDist().inv_cdf(0.92)
    expected = NormalDist().pdf(quantile) - quantile * 0.08
    assert abs(float(stat_topk(jnp.asarray(normal(400, 4096)), 0.92).mean()) / expected - 1) < 0.01
    assert expected == pytest.approx(0.0363, abs=1e-4)


def test_statistical_topk_gradient_stops_at_the_statistics_only_if_asked():
    x = jnp.asarray(normal(64))
    stopped = jax.grad(lambda v: stat_topk(v, 0.9, through_statistics=False).sum())(x)
    np.testing.assert_array_equal(stopped, stat_topk(x, 0.9) > 0)
    with jax.enable_x64(True):
        row, direction = (jnp.asarray(normal(64, seed=seed), jnp.float64) for seed in (0, 1))
        total = jax.jit(lambda v: stat_topk(v, 0.9).sum())
        numeric = (total(row + 1e-6 * direction) - total(row - 1e-6 * direction)) / 2e-6
        assert float(jax.jvp(total, (row,), (direction,))[1]) == pytest.approx(float(numeric), rel=1e-6)


def test_a_constant_row_has_a_finite_gradient():
    assert np.isfinite(jax.grad(lambda v: stat_topk(v, 0.9).sum())(jnp.zeros((2, 8)))).all()


def test_sparsity_zero_is_the_input_itself():
    x = jnp.asarray(normal(2, 8))
    assert stat_topk(x, 0.0) is x
    for sparsity in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="sparsity"):
            stat_topk(x, sparsity)
