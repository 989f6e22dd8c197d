"""Shares by marginal loss: budgets are met, slopes are those of the loss, and what is dear is spared."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import nnx_compat
from sparsejax.compress.allocate import plan_sparsity
from sparsejax.compress.allocators import Problem
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work
from sparsejax.compress.surgery import place, sites_of
from sparsejax.context import Context
from sparsejax.methods.sparsity.isocline import (
    LEAST,
    MOST,
    STRIDE,
    Isocline,
    MarginalLoss,
    Slopes,
    at_target,
    smoothed,
    within_stride,
)
from sparsejax.methods.sparsity.teal import Teal
from sparsejax.methods.sparsity.wina import Wina
from sparsejax.plugs import ConfigError, names
from tests.compress.tiny import tiny_model

TOKENS = np.random.default_rng(0).integers(0, 256, (4, 64), np.int32)


def work(**fields):
    return Work(Calibration(CalibrationSpec("here", *TOKENS.shape), TOKENS, ""), TIERS["quick"], **fields)


def problem(one, **fields):
    model, given_work = tiny_model(layers=2, width=16, hidden=32), work(**fields)
    sites = sites_of(model.config, "inputs", one.sites)
    return Problem(model, tuple(sites), one.selection(model, given_work, sites), given_work, one.name)


@given(st.lists(st.tuples(st.floats(0.001, 0.999), st.integers(1, 50)), min_size=1, max_size=9), st.floats(LEAST, MOST))
def test_odds_are_moved_together_until_the_target_is_met(found, target):
    shares, sizes = np.array(found).T
    moved = at_target(shares, sizes, target)
    assert moved @ sizes == pytest.approx(target * sizes.sum(), rel=1e-6)
    assert np.all((moved >= LEAST) & (moved <= MOST))
    free = (moved > LEAST + 1e-9) & (moved < MOST - 1e-9)
    by = np.log(moved / (1 - moved)) - np.log(shares / (1 - shares))
    assert not free.any() or np.ptp(by[free]) < 1e-6


@given(st.lists(st.floats(-1, 10), min_size=3, max_size=12))
def test_smoothing_keeps_the_ends_and_leaves_no_site_free(costs):
    sites = [f"blocks.{layer}.mlp.up" for layer in range(len(costs))]
    found = smoothed(sites, np.array(costs))
    assert np.all(found > 0)
    for end in (0, -1):
        assert found[end] >= costs[end]
    np.testing.assert_allclose(smoothed(sites, np.full(len(costs), 2.0)), 2.0)


def test_a_slope_is_what_the_loss_rises_by():
    """Against differences over shares, over as many entries as the ramp covers: two estimates, so to a third."""
    whole = problem(Wina(select="threshold"))
    slopes = Slopes(whole)
    site = whole.sites.index("blocks.1.mlp.down")
    at = np.full(len(whole.sites), 0.5)

    def loss(share):
        shares = at.copy()
        shares[site] = share
        return np.mean([slopes(shares, row[None])[0] for row in TOKENS])

    mean = np.mean([slopes(at, row[None])[1] for row in TOKENS], axis=0)
    assert mean[site] == pytest.approx((loss(0.6) - loss(0.4)) / 0.2, rel=0.33)
    assert mean.sum() > 0


def test_the_loss_is_the_divergence_from_the_dense_model():
    whole = problem(Teal(select="threshold"))
    shares = np.full(len(whole.sites), 0.5)
    found, _ = Slopes(whole)(shares, TOKENS[:1])
    sparse = place(whole.model, "inputs", {site: whole.select(site, 0.5) for site in whole.sites})

    def log_p(model):
        module = nnx_compat.merge(model.structure, model.values)
        h, _, _ = module.features({"tokens": jnp.asarray(TOKENS[:1])}, Context(mode="prefill"))
        return np.asarray(jax.nn.log_softmax(module.logits(h)), np.float64)

    p, q = log_p(whole.model), log_p(sparse)
    assert found == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), -1)), rel=0.02)  # thresholds lie between knots there


def test_plans_meet_the_target_and_resume_to_the_same(tmp_path):
    one = Wina(select="threshold")
    whole = problem(one, folder=tmp_path)
    plan = MarginalLoss(rounds=2)(whole, 0.5)
    assert plan_sparsity(whole.sizes, plan) == pytest.approx(0.5, abs=1e-6)
    assert len(set(plan.values())) > 5
    kept = sorted(tmp_path.glob("*marginal*"))
    assert len(kept) == len(TOKENS)  # one for each sequence
    kept[-1].unlink()
    assert MarginalLoss(rounds=2)(problem(one, folder=tmp_path), 0.5) == pytest.approx(plan, rel=1e-5)


def test_a_map_that_does_not_reach_the_output_is_dropped_most():
    one = Teal(select="threshold")
    whole = problem(one)
    site = "blocks.0.mlp.down"
    quiet = {f"{site}.kernel": whole.model.parameter(f"{site}.kernel") * 1e-3}
    model = whole.model.rebuilt(whole.model.config, quiet)
    quieter = dataclasses.replace(whole, model=model, select=one.selection(model, whole.work, whole.sites))
    plan = MarginalLoss(rounds=2)(quieter, 0.5)
    assert plan[site] == max(plan.values())
    assert plan[site] > MarginalLoss(rounds=2)(whole, 0.5)[site]


@given(st.lists(st.tuples(st.floats(LEAST, MOST), st.floats(LEAST, MOST)), min_size=1, max_size=9))
def test_a_round_moves_odds_by_no_more_than_its_stride(found):
    shares, wanted = np.array(found).T
    moved = within_stride(shares, wanted)
    factor = moved / (1 - moved) / (shares / (1 - shares))
    assert np.all((factor <= STRIDE * (1 + 1e-9)) & (factor >= (1 - 1e-9) / STRIDE))
    near = np.abs(np.log(wanted / (1 - wanted)) - np.log(shares / (1 - shares))) <= np.log(STRIDE)
    np.testing.assert_allclose(moved[near], wanted[near], rtol=1e-9)


def test_what_cannot_be_done_is_refused_before_any_work():
    config = tiny_model(layers=2, width=16, hidden=32).config
    Isocline(0.95).check(config)
    with pytest.raises(ConfigError, match="sparsity = 0.97: the chosen sites reach 0.950 at most"):
        Isocline(0.97).check(config)
    with pytest.raises(ConfigError, match="isocline: select = 'topk'"):
        Isocline(select="topk").check(config)
    with pytest.raises(ConfigError, match="needs one threshold per site, and blocks.0.attn.q has topk"):
        MarginalLoss()(problem(Wina(select="topk")), 0.5)
    with pytest.raises(ConfigError, match="MarginalLoss: rounds = 0"):
        MarginalLoss(rounds=0)


def test_the_allocator_has_a_name_like_the_others():
    assert names("allocator") == ["equal_marginal", "fixed_ratio", "greedy", "marginal_loss", "uniform"]
