"""Refit against least squares, and what it leaves alone."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import entry
from sparsejax import nnx_compat
from sparsejax.compress.allocators import Uniform
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, run_recipe
from sparsejax.methods.sparsity.chess import Chess
from sparsejax.methods.sparsity.refit import DAMPINGS, Moments, Refit, refitted
from sparsejax.methods.sparsity.rsparse import RSparse
from sparsejax.methods.sparsity.teal import Teal
from sparsejax.plugs import ConfigError
from tests.compress.tiny import tiny_model

TOKENS = np.random.default_rng(0).integers(0, 256, (8, 64), np.int32)


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=3, width=32, hidden=64)


def work(tokens=TOKENS, folder=None):
    return Work(Calibration(CalibrationSpec(sequences=len(tokens), length=tokens.shape[1]), tokens, ""), TIERS["quick"], folder)


def drop(sparsity=0.6, sites="blocks.**"):
    return Teal(sparsity, allocator=Uniform(), sites=sites)


def moments(kept, x):
    return Moments(kept.T @ kept, kept.T @ x)


@given(st.integers(0, 99), st.floats(0.0, 0.9), st.sampled_from(DAMPINGS[:-1]))
def test_the_solution_is_where_the_gradient_of_the_loss_vanishes(seed, share, damping):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(50, 7)) @ rng.normal(size=(7, 7))
    kept, kernel = np.where(np.abs(x) > np.quantile(np.abs(x), share), x, 0), rng.normal(size=(7, 3))
    found = moments(kept, x).solved(kernel, damping)
    ridge = damping * np.trace(kept.T @ kept) / 7
    gradient = kept.T @ (kept @ found - x @ kernel) + ridge * (found - kernel)
    np.testing.assert_allclose(gradient, 0, atol=1e-8 * np.abs(x.T @ x @ kernel).max())
    constant = np.sum(np.square(x @ kernel))
    assert moments(kept, x).loss(kernel, found) + constant == pytest.approx(np.sum(np.square(kept @ found - x @ kernel)))


def test_nothing_dropped_changes_nothing_and_nothing_kept_leaves_the_weights():
    x, kernel = np.random.default_rng(1).normal(size=(40, 5)), np.arange(10, dtype=np.float32).reshape(5, 2)
    np.testing.assert_allclose(refitted(kernel, moments(x, x), moments(x, x))[0], kernel, rtol=1e-5, atol=1e-5)
    nothing = moments(0 * x, x)
    np.testing.assert_array_equal(refitted(kernel, nothing, nothing)[0], kernel)


def test_the_damping_is_what_the_other_half_bears_out():
    """What is dropped is predicted by what is kept, or is not."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(40, 3)).astype(np.float32)

    def halves(tied):
        found = []
        for _ in range(2):
            kept, other = rng.normal(size=(2, 60, 20))
            x = np.concatenate([kept, kept if tied else other], axis=1)
            found.append(moments(np.concatenate([kept, 0 * kept], axis=1), x))
        return found

    refit, damping = refitted(kernel, *halves(True))
    assert damping == DAMPINGS[0]
    np.testing.assert_allclose(refit[:20], kernel[:20] + kernel[20:], atol=0.3)
    refit, damping = refitted(kernel, *halves(False))
    assert damping >= 3.0 and np.abs(refit - kernel).max() < 0.2


def block_errors(model, dense, tokens):
    """By layer, ||sparse block(h) - dense block(h)||^2 over ||h||^2, h what the sparse blocks before let through."""
    blocks, whole, found = Blocks(model), Blocks(dense), []
    h = blocks.embed(tokens)
    for layer in range(len(blocks)):
        ours, theirs = blocks.run(layer, h)[0], whole.run(layer, h)[0]
        found.append(float(jnp.sum(jnp.square(ours - theirs)) / jnp.sum(jnp.square(theirs))))
        h = ours
    return np.array(found)


@pytest.fixture(scope="module")
def pair(model):
    """Sparse, and refitted as well."""
    return run_recipe([drop()], model, work()), run_recipe([drop(), Refit()], model, work())


def test_every_block_comes_nearer_to_its_dense_output(model, pair):
    sparse, refit = pair
    for tokens in (TOKENS, np.random.default_rng(1).integers(0, 256, (8, 64), np.int32)):  # fitted to, and others
        before, after = block_errors(sparse, model, tokens), block_errors(refit, model, tokens)
        assert np.all(after < before)
    assert refit.config == sparse.config and refit.parameter("blocks.1.mlp.up.kernel").shape == (32, 64)


def test_thresholds_keep_the_share_that_they_drop_of_dense_inputs(pair):
    """Behind sparse blocks other numbers enter; only the first block's q, k and v see what they saw."""

    def dropped(one, site):
        blocks = Blocks(one)
        layer, name = int(site.split(".")[1]), site.split(".", 2)[2]
        h = next(h for at, h in blocks.stream(TOKENS) if at == layer)
        return float(np.mean(np.asarray(blocks.entering(layer, h, name)[name]) == 0))

    sites = ("blocks.0.mlp.down", "blocks.2.mlp.gate")
    before, after = ([dropped(one, site) for site in sites] for one in pair)
    np.testing.assert_allclose(after, 0.6, atol=2e-3)
    assert np.abs(np.subtract(before, 0.6)).max() > 5e-3
    sparse, refit = (one.parameter("blocks.0.attn.q.inputs.0.threshold") for one in pair)
    np.testing.assert_allclose(refit, sparse, rtol=1e-3)


def test_units_chosen_by_their_gate_are_made_up_for(model):
    """Their thresholds, one per channel, stay."""
    sparse, refit = (run_recipe([Chess(0.5), *more], model, work()) for more in ((), (Refit(sites="blocks.*.mlp.*"),)))
    assert np.all(block_errors(refit, model, TOKENS) < block_errors(sparse, model, TOKENS))
    for path in (path for path in sparse.structure.paths if path[-1] == "threshold"):
        np.testing.assert_array_equal(nnx_compat.at(refit.values, path), nnx_compat.at(sparse.values, path))


def test_only_named_maps_change_and_a_dense_model_stays_as_it_is(model):
    assert run_recipe([drop(0.0), Refit()], model, work()) is model
    refit = run_recipe([drop(), Refit(sites="blocks.*.mlp.down")], model, work())
    for site, same in (("attn.q", True), ("mlp.up", True), ("mlp.down", False)):
        ours, theirs = (np.asarray(one.parameter(f"blocks.2.{site}.kernel")) for one in (refit, model))
        assert np.array_equal(ours, theirs) == same


def test_the_first_position_keeps_its_outliers(model):
    tokens = TOKENS.copy()
    tokens[:, 0] = 7
    sparse, refit = (run_recipe([drop(0.8), *more], model, work(tokens)) for more in ((), (Refit(),)))

    def first(one):
        blocks, whole = Blocks(one), Blocks(model)
        h = blocks.embed(tokens[:1, :1])
        return float(jnp.sum(jnp.square(blocks.run(0, h)[0] - whole.run(0, h)[0])))

    assert first(refit) < 0.3 * first(sparse)


def test_an_interrupted_refit_goes_on_to_the_same_weights(model, tmp_path):
    recipe = [drop(sites="blocks.*.mlp.*"), Refit(sites="blocks.*.mlp.*")]
    whole = run_recipe(recipe, model, work(folder=tmp_path))
    kept = sorted(tmp_path.glob("1-block-*"))
    assert len(kept) == 3
    kept[-1].unlink()
    again = run_recipe(recipe, model, work(folder=tmp_path))
    for site in ("blocks.0.mlp.up", "blocks.2.mlp.down"):
        np.testing.assert_allclose(again.parameter(f"{site}.kernel"), whole.parameter(f"{site}.kernel"), rtol=1e-5, atol=1e-6)


def test_the_recipe_follows_any_other():
    recipe = entry.from_file("--recipe", "configs/recipes/refit.py:teal:0.5,topk,uniform", "get_recipe")
    assert recipe == [Teal(0.5, "topk", Uniform()), Refit()]
    with pytest.raises(ConfigError, match="refit: recipe = 'tael': allowed are .* Did you mean 'teal'"):
        entry.from_file("--recipe", "configs/recipes/refit.py:tael:0.5", "get_recipe")


def test_what_cannot_be_refitted_is_refused(model):
    with pytest.raises(ConfigError, match=r"calibration\.sequences = 1: must be at least 2"):
        run_recipe([drop(), Refit()], model, work(TOKENS[:1]))
    with pytest.raises(ConfigError, match="names no site"):
        Refit(sites="blocks.*.mlp.gone").check(model.config)
    with pytest.raises(ConfigError, match=r"refit: blocks.0.attn.q = .*low_rank_residual.*: is what the map multiplies"):
        run_recipe([RSparse(0.5, rho=0.5), Refit()], model, work())
    with pytest.raises(ConfigError, match="changes activations after refit has fitted compensation"):
        run_recipe([Refit(), drop()], model, work())
