"""WINA: the weighted score is the best mask where rows are orthogonal, and ignores how a channel's scale is shared."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.compress.allocators import Uniform
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, run_recipe
from sparsejax.context import Context
from sparsejax.methods.sparsity.selection import TopK
from sparsejax.methods.sparsity.wina import Wina, channel_norms
from sparsejax.plugs import ConfigError
from tests.compress.tiny import tiny_model

TOKENS = np.random.default_rng(0).integers(0, 250, (3, 24)).astype(np.int32)


def work():
    return Work(Calibration(CalibrationSpec(sequences=3, length=24), TOKENS, ""), TIERS["quick"])


SELECT = jax.jit(lambda arrays, x: TopK(score="weighted", fitted=True)(arrays, x, Context()).mask)


def mask(x, scale, k):
    arrays = {"count": jnp.float32(k), "scale": jnp.asarray(scale, jnp.float32)}
    return np.asarray(SELECT(arrays, jnp.asarray(x, jnp.float32)))


def orthogonal_rows(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((columns, rows)))[0].T * rng.uniform(0.2, 3, (rows, 1))


@given(st.integers(0, 10**6))
def test_no_mask_is_better_where_the_rows_of_the_kernel_are_orthogonal(seed):
    rng = np.random.default_rng(seed)
    w, x = orthogonal_rows(rng, 9, 12), rng.standard_normal(9)
    kept = mask(x, np.linalg.norm(w, axis=1), 4)
    best = min(np.linalg.norm(np.delete(x, c) @ np.delete(w, c, axis=0)) for c in itertools.combinations(range(9), 4))
    assert np.linalg.norm((x * ~kept) @ w) <= best * (1 + 1e-5)


@given(st.integers(0, 10**6))
def test_a_channels_scale_may_move_between_input_and_kernel(seed):
    rng = np.random.default_rng(seed)
    w, x, alpha = rng.standard_normal((16, 5)), rng.standard_normal(16), 2.0 ** rng.integers(-3, 4, 16)
    moved = w * alpha[:, None]
    np.testing.assert_array_equal(mask(x, np.linalg.norm(w, axis=1), 6), mask(x / alpha, np.linalg.norm(moved, axis=1), 6))


def test_equal_norms_give_the_mask_of_the_magnitudes_and_weights_help_on_average():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 32))
    magnitude = np.asarray(TopK(0.5)(jnp.asarray(x, jnp.float32), Context()).mask)
    np.testing.assert_array_equal(mask(x, np.full(32, 1.7), 16), magnitude)
    w = rng.standard_normal((32, 24)) * rng.uniform(0.3, 3, (32, 1))
    weighted = mask(x, np.linalg.norm(w, axis=1), 16)
    errors = [np.linalg.norm((x * ~kept) @ w, axis=-1) for kept in (weighted, magnitude)]
    assert errors[0].mean() < 0.95 * errors[1].mean() and (errors[0] > errors[1]).any()  # not for every x


def test_the_pass_fits_the_norms_of_every_map_or_of_those_that_the_paper_weighs():
    dense = tiny_model(layers=2)
    sparse = run_recipe([Wina(0.5, allocator=Uniform())], dense, work())
    for site in ("blocks.0.attn.v", "blocks.1.mlp.down"):
        kernel = np.asarray(dense.parameter(f"{site}.kernel"))
        np.testing.assert_allclose(sparse.parameter(f"{site}.inputs.0.scale"), np.linalg.norm(kernel, axis=1), rtol=1e-6)
        np.testing.assert_array_equal(channel_norms(dense, site), sparse.parameter(f"{site}.inputs.0.scale"))
        assert float(sparse.parameter(f"{site}.inputs.0.count")) == kernel.shape[0] // 2
    released = run_recipe([Wina(0.5, "threshold", Uniform(), weights="released")], dense, work())
    assert [rule.split("=", 1)[0] for rule in released.config.inputs if "weighted" in rule] == [
        "blocks.*.attn.k", "blocks.*.mlp.gate"]
    with pytest.raises(ConfigError, match="wina: weights = 'paper': allowed are 'all', 'released'"):
        Wina(weights="paper").check(dense.config)


def test_thresholds_of_the_weighted_score_drop_their_share():
    dense, site = tiny_model(layers=1), "blocks.0.mlp.down"
    sparse = run_recipe([Wina(0.3, "threshold", Uniform(), sites=site)], dense, work())
    blocks = Blocks(dense)
    h = np.asarray(blocks.tensors(0, blocks.embed(TOKENS), "mlp.down")[1]["mlp.down"])
    score = np.abs(h) * channel_norms(dense, site)
    assert np.mean(score <= float(sparse.parameter(f"{site}.inputs.0.threshold"))) == pytest.approx(0.3, abs=2 / score.size)
