"""Rotations alone change nothing; La RoSA keeps exactly k per token at the sparsity asked for; SCAP, COUNTDOWN and N:M."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.recipes import larosa as recipe
from sparsejax import nnx_compat
from sparsejax.arrays import dense, matmul
from sparsejax.compress.allocate import plan_sparsity
from sparsejax.compress.allocators import Problem
from sparsejax.compress.basis import eigenbasis, random_basis
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.compress.surgery import Placed, sites_of
from sparsejax.compress.transforms import fold_norms
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.countdown import Countdown
from sparsejax.methods.sparsity.larosa import LaRosa
from sparsejax.methods.sparsity.n_of_m import ActivationNofM
from sparsejax.methods.sparsity.rotate import Rotate
from sparsejax.methods.sparsity.scap import Centred, Scap, half_sample_mode
from sparsejax.methods.sparsity.selection import Threshold, TopK
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.models.transformer import Transformer
from sparsejax.ops.selectors import topk_mask
from sparsejax.plugs import ConfigError

TOKENS = np.random.default_rng(0).integers(0, 64, (4, 48)).astype(np.int32)
CTX = Context()
WIDTH, KEYS = 32, 16  # D, and the width G K of k and v


@functools.cache
def tiny():
    """Random parameters; what flows has uneven variances, as it has in trained models."""
    config = ModelConfig(
        num_layers=2, d_model=WIDTH, vocab_size=64, max_length=48, unroll=1, ffn=FFNConfig(64, activation="swiglu"),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    )  # fmt: skip
    structure, shapes = nnx_compat.abstract(lambda: Transformer(config, jax.random.key(0)))
    rng = np.random.default_rng(1)
    spread = (np.geomspace(1, 0.05, WIDTH) * WIDTH**0.5) * random_basis(WIDTH, 5)

    def draw(variable, like):
        drawn = rng.normal(size=like.shape) * like.shape[-2 if len(like.shape) > 1 else -1] ** -0.5
        writes = like.shape[-1] == WIDTH and variable.role in ("matrix", "embedding")
        drawn = drawn @ spread.T if writes else drawn
        return jnp.asarray(1 + drawn if variable.role == "norm" else drawn, jnp.float32)

    return Model("tiny", config, structure, structure.map(draw, shapes))


def work(folder=None, skip_first=0):
    spec = CalibrationSpec("stdlib:calibration", *TOKENS.shape, skip_first=skip_first)
    return Work(Calibration(spec, TOKENS, ""), TIERS["quick"], folder)


@functools.cache
def dense_logits():
    return logits_of(tiny())


def logits_of(model):
    def forward(values):
        return nnx_compat.merge(model.structure, values)({"tokens": jnp.asarray(TOKENS)}, Context(mode="prefill"))[0]

    return np.asarray(jax.jit(forward)(model.values))


@functools.cache
def rotated(basis="pca", per=""):
    done = work()
    return run_recipe([Rotate(basis, per)], tiny(), done), done.notes["0-rotate"]


@pytest.mark.parametrize("basis, per, maps", [
    ("pca", "", 3), ("pca", "layer", 1), ("pca", "model", 0), ("wina", "", 3), ("weights", "", 3), ("hadamard", "", 0),
    ("random", "segment", 3),
])  # fmt: skip
def test_without_selection_the_model_is_what_it_was(basis, per, maps):
    model, note = rotated(basis, per)
    assert note["maps"] == maps and note["map_bytes"] == maps * WIDTH**2 * 4
    if basis == "pca":
        np.testing.assert_allclose(logits_of(model), dense_logits(), rtol=0, atol=1e-4 * np.abs(dense_logits()).max())


def test_in_the_basis_of_principal_components_what_is_read_is_uncorrelated_and_sorted():
    blocks = Blocks(rotated()[0])
    h = blocks.embed(TOKENS)
    for layer in range(len(blocks)):
        h, read = blocks.tensors(layer, h, "attn.q", "mlp.up")
        for x in read.values():
            rows = np.asarray(x, np.float64).reshape(-1, WIDTH)
            moment = rows.T @ rows / len(rows)
            variances = np.diag(moment)
            assert np.abs(moment - np.diag(variances)).max() < 1e-4 * variances.max()
            assert (np.diff(variances) < 1e-4 * variances.max()).all()


def test_in_the_basis_of_wina_the_rows_of_k_and_gate_are_orthogonal_and_k_reads_as_many_as_it_has_columns():
    model, _ = rotated("wina")
    for site in ("blocks.1.attn.k", "blocks.1.mlp.gate"):
        kernel = np.asarray(model.parameter(f"{site}.kernel"), np.float64)
        gram = kernel @ kernel.T
        assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-6 * gram.max()
        rank = KEYS if site.endswith("k") else WIDTH
        assert (np.linalg.norm(kernel, axis=1) > 1e-5).sum() == rank


def test_an_interrupted_rotation_goes_on_from_its_pieces(tmp_path, monkeypatch):
    first = run_recipe([Rotate()], tiny(), work(tmp_path))
    monkeypatch.setattr(Blocks, "run", None)  # nothing is measured again
    again = run_recipe([Rotate()], tiny(), work(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, first.values, again.values)


def test_first_tokens_are_left_out_of_the_moments():
    kept = run_recipe([Rotate()], tiny(), work(skip_first=40))
    assert not np.allclose(kept.parameter("blocks.0.skip_attn.0.map"), rotated()[0].parameter("blocks.0.skip_attn.0.map"))


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.65])
def test_the_model_sparsity_is_what_was_asked_for(sparsity):
    sites = sites_of(tiny().config, "inputs", "blocks.**")

    def plan(sharing):
        one = recipe.get_recipe(f"{sparsity},{sharing}")[1]
        problem = Problem(tiny(), tuple(sites), lambda site, share: Placed("topk"), work())
        shares = one.allocator(problem, one.sparsity)
        return shares, plan_sparsity(problem.sizes, shares)

    for sharing in ("uniform", "ratio"):
        assert plan(sharing)[1] == pytest.approx(sparsity, abs=1e-6)
    shares, less = plan("released")
    assert less == pytest.approx((0.8 * 2 / 3 + 1.2 / 3) * sparsity)  # o and down are a third of this model
    assert [shares[f"blocks.0.{site}"] for site in ("attn.q", "mlp.down")] == pytest.approx([0.8 * sparsity, 1.2 * sparsity])


def test_every_token_keeps_exactly_k_at_every_input():
    model = run_recipe([LaRosa(0.5)], rotated()[0], work())
    kept = {"attn.q": 18, "attn.o": 11, "mlp.up": 18, "mlp.down": 23}  # 1 - s of 32 and 64; s = .8 and 1.2 times .5 / .933
    blocks = Blocks(model)
    h = blocks.embed(TOKENS)
    for layer in range(len(blocks)):
        h, read = blocks.tensors(layer, h, "attn.q", "attn.o", "mlp.up", "mlp.down")
        for name, x in read.items():
            assert f"blocks.*.{name}=topk:k={kept[name]}" in model.config.inputs
            assert (np.sum(np.asarray(x) != 0, -1) == kept[name]).all()


def test_at_sparsity_zero_nothing_is_placed():
    assert run_recipe([LaRosa(0.0)], tiny(), work()) is tiny()


def test_the_recipe_is_refused_before_work_where_it_cannot_be_done():
    check_recipe(recipe.get_recipe("0.5"), tiny().config)
    with pytest.raises(ConfigError, match="changes structure after larosa"):
        check_recipe(recipe.get_recipe("0.5")[::-1], tiny().config)
    with pytest.raises(ConfigError, match="basis = 'pcs'.*'pca'"):
        check_recipe([Rotate("pcs")], tiny().config)
    with pytest.raises(ConfigError, match="allowed are 'ratio', 'uniform', 'released'"):
        recipe.get_recipe("0.5,half")
    with pytest.raises(ConfigError, match="must stay below 1"):
        run_recipe(recipe.get_recipe("0.9,released")[1:], tiny(), work())


@pytest.mark.parametrize("name", ["larosa", "wina_rotated", "rotate", "scap", "countdown", "n_of_m"])
def test_shipped_recipes_can_be_done_to_a_llama(name):
    check_recipe(importlib.import_module(f"configs.recipes.{name}").get_recipe(), tiny().config)


def dropped(x, basis, k):
    """Share of the energy that top-k in a basis loses."""
    y = x @ basis
    mask = np.asarray(topk_mask(jnp.abs(jnp.asarray(y, jnp.float32)), k))
    return np.sum((y * ~mask) ** 2) / np.sum(x**2)


def test_principal_components_recover_a_hidden_diagonal_basis_and_lose_less():
    rng, hidden = np.random.default_rng(3), random_basis(64, 7)
    scales = 0.8 ** np.arange(64)  # far enough apart for a sample of 4000
    x = rng.normal(size=(4000, 64)) * scales @ hidden
    found = eigenbasis(x.T @ x / len(x))
    np.testing.assert_allclose(np.diag(np.abs(hidden @ found))[:8], 1, atol=0.01)
    assert dropped(x, found, 16) < 0.2 * dropped(x, np.eye(64), 16)
    even = rng.normal(size=(4000, 64))
    assert dropped(even, eigenbasis(even.T @ even / 4000), 16) == pytest.approx(dropped(even, np.eye(64), 16), rel=0.03)


def test_top_k_in_the_basis_of_a_subspace_of_k_dimensions_loses_nothing():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 32))
    assert dropped(x, eigenbasis(x.T @ x / 200), 5) < 1e-10


def test_weighted_top_k_with_equal_weights_is_larosas():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(6, 32)), jnp.float32)
    weighted = TopK(k=9, score="weighted")({"scale": jnp.full((32,), 3.0)}, x, CTX)
    np.testing.assert_array_equal(weighted.mask, TopK(k=9)(x, CTX).mask)


@given(st.integers(0, 20), st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_centring_a_shifted_tensor_leaves_the_mask_and_adds_the_constant_back(seed, mode):
    rng = np.random.default_rng(seed)
    x, w = rng.integers(-40, 40, (5, 16)) / 8, rng.normal(size=(16, 7))  # shifts by eighths are exact
    mode = round(mode * 8) / 8
    fit = {"mean": jnp.float32(mode), "threshold": jnp.float32(1.3)}
    sparse = Threshold("centred")(fit, jnp.asarray(x + mode, jnp.float32), CTX)
    plain = Threshold()({"threshold": jnp.float32(1.3)}, jnp.asarray(x, jnp.float32), CTX)
    np.testing.assert_array_equal(sparse.mask, plain.mask)
    operand = Centred()({"mean": jnp.float32(mode)}, jnp.asarray(w, jnp.float32), CTX)
    expected = (x * (np.abs(x) > 1.3)) @ w + mode * w.sum(0)
    np.testing.assert_allclose(matmul(sparse, operand), expected, atol=1e-4)
    np.testing.assert_allclose(matmul(jnp.asarray(x, jnp.float32), operand), x @ w, atol=1e-4)


def test_the_half_sample_mode_finds_the_peak_and_not_the_mean():
    rng = np.random.default_rng(6)
    sample = np.concatenate([rng.normal(-0.2, 0.05, 6000), rng.exponential(2, 4000)])
    assert abs(half_sample_mode(sample) + 0.2) < 0.06 < sample.mean()
    assert half_sample_mode(np.array([1.0, 5.0, 5.0, 9.0])) == 5.0


def entering(model, site="mlp.down"):
    """What the first block's map multiplies."""
    blocks = Blocks(model)
    return np.asarray(blocks.tensors(0, blocks.embed(TOKENS), site)[1][site], np.float64)


def test_scap_drops_the_share_around_the_mode():
    done = work()
    model = run_recipe([Scap(0.4, "blocks.*.mlp.down")], tiny(), done)
    mode = done.notes["0-scap"]["modes"]["blocks.0.mlp.down"]
    fit = {name: model.parameter(f"blocks.0.mlp.down.inputs.0.{name}") for name in ("mean", "threshold")}
    assert mode == float(fit["mean"]) == float(model.parameter("blocks.0.mlp.down.weights.0.mean"))
    h = entering(tiny())
    assert np.mean(np.abs(h - mode) <= float(fit["threshold"])) == pytest.approx(0.4, abs=1e-3)
    assert np.isfinite(logits_of(model)).all()


def test_countdown_keeps_the_units_that_move_the_output_and_does_not_mind_how_they_are_scaled():
    model = run_recipe([Countdown(0.6)], tiny(), work())
    h, down = entering(tiny()), np.asarray(tiny().parameter("blocks.0.mlp.down.kernel"), np.float64)
    score = np.abs(h) * np.linalg.norm(down, axis=1)
    kept = entering(model) != 0
    threshold = float(model.parameter("blocks.0.mlp.down.inputs.0.threshold"))
    assert kept.mean() == pytest.approx(0.4, abs=1e-3)
    assert (kept == (score > threshold))[np.abs(score / threshold - 1) > 1e-5].all()
    factor = jnp.asarray(np.random.default_rng(7).uniform(0.5, 2, down.shape[0]), jnp.float32)
    scaled = {"blocks.0.mlp.down.kernel": jnp.asarray(down, jnp.float32) / factor[:, None],
              "blocks.0.mlp.up.kernel": tiny().parameter("blocks.0.mlp.up.kernel") * factor[None]}  # fmt: skip
    other = run_recipe([Countdown(0.6)], tiny().rebuilt(tiny().config, scaled), work())
    assert np.mean((entering(other) != 0) != kept) < 1e-3


def test_n_of_m_keeps_n_of_every_m_and_checks_widths_first():
    model = run_recipe([ActivationNofM(2, 8)], tiny(), work())
    groups = entering(model).reshape(-1, 8)
    assert (np.sum(groups != 0, -1) == 2).all()
    assert run_recipe([ActivationNofM(4, 4)], tiny(), work()) is tiny()
    with pytest.raises(ConfigError, match="must divide the width 32"):
        check_recipe([ActivationNofM(2, 7)], tiny().config)


def test_selection_fitted_before_a_rotation_is_refused():
    sparse = run_recipe([LaRosa(0.5)], tiny(), work())
    with pytest.raises(ConfigError, match="blocks.0.attn.q: model.inputs = 'topk:k=18'.*change the basis first"):
        check_recipe([Rotate()], sparse.config)
    assert dense(fold_norms(tiny()).parameter("norm.gain")).min() == 1
