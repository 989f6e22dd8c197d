"""R-Sparse: its budget, its factors, and the identities at both ends of rho."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.arrays import LowRank, Residual, SparseActivation, matmul
from sparsejax.compress.allocators import Uniform
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import Tier, Work, run_recipe
from sparsejax.compress.surgery import sites_of
from sparsejax.io import model_folder
from sparsejax.methods.sparsity.rsparse import Fit, RSparse, best_low_rank, budget, mean_loss
from sparsejax.methods.sparsity.wina import Wina
from sparsejax.plugs import ConfigError
from tests.compress.tiny import tiny_model

TOKENS = np.random.default_rng(0).integers(0, 250, (3, 24)).astype(np.int32)
SITES = "blocks.*.mlp.{up,down}"


def work(**fields):
    tier = Tier(3, 24, 48, 0.1, population=4, generations=2, windows=1, window=24)
    return Work(Calibration(CalibrationSpec(sequences=3, length=24), TOKENS, ""), tier, **fields)


def measured(model, tokens=TOKENS):
    return float(jax.jit(lambda values: mean_loss(model, values, tokens))(model.values))


@pytest.fixture(scope="module")
def dense():
    return tiny_model(layers=2)


@given(st.integers(8, 4096), st.integers(8, 4096), st.floats(0, 0.95), st.floats(0, 1))
def test_channels_and_ranks_stay_within_the_bytes_and_use_them(n_in, n_out, sparsity, rho):
    channels, rank = budget(n_in, n_out, sparsity, rho)
    spent, allowed = channels * n_out + rank * (n_in + n_out), n_in * n_out * (1 - sparsity)
    assert spent <= allowed + 1e-6 and (allowed - spent < n_in + n_out + n_out or rank == min(n_in, n_out))


def test_the_cards_worked_example():
    assert budget(4096, 4096, 0.5, 0.95) == (1945, 51)
    assert budget(576, 576, 0.5, 1.0) == (288, 0)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_factors_are_the_truncated_svd(shape):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    singular = np.linalg.svd(w.astype(np.float64))[1]
    for rank in (1, 5, 12):
        a, b = best_low_rank(w, rank)
        assert a.shape == (shape[0], rank) and b.shape == (rank, shape[1])
        assert np.sum((w - a.astype(np.float64) @ b) ** 2) == pytest.approx(np.sum(singular[rank:] ** 2), abs=1e-9, rel=1e-5)
        a5, b5 = best_low_rank(w, min(rank + 3, 12))
        np.testing.assert_allclose(a5[:, :rank] @ b5[:rank], a @ b, atol=1e-5)  # fewer columns are a smaller rank


@given(st.integers(0, 10**6))
def test_full_rank_makes_any_mask_exact_and_the_norms_are_those_of_the_singular_basis(seed):
    rng = np.random.default_rng(seed)
    w, x = rng.standard_normal((10, 14)).astype(np.float32), rng.standard_normal((3, 10)).astype(np.float32)
    mask = rng.random((3, 10)) < 0.5
    a, b = best_low_rank(w, 10)
    y = matmul(SparseActivation(jnp.asarray(x), jnp.asarray(mask)), Residual(jnp.asarray(w), LowRank(a, b), None))
    np.testing.assert_allclose(y, x @ w, atol=2e-5)
    u, singular, _ = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(np.linalg.norm(u * singular, axis=1), np.linalg.norm(w.astype(np.float64), axis=1), rtol=1e-12)


def test_sparsity_zero_is_the_dense_model_and_rho_one_is_the_weighted_threshold(dense):
    assert run_recipe([RSparse(0.0)], dense, work()) is dense
    ours = run_recipe([RSparse(0.5, rho=1.0, sites=SITES)], dense, work())
    wina = run_recipe([Wina(0.5, "threshold", Uniform(), sites=SITES)], dense, work())
    assert ours.config == wina.config and not ours.config.weights
    jax.tree.map(np.testing.assert_array_equal, ours.values, wina.values)


def test_rho_zero_is_the_truncated_svd_of_every_map(dense):
    ours = run_recipe([RSparse(0.5, rho=0.0, sites="blocks.*.mlp.down")], dense, work())
    rank = budget(64, 32, 0.5, 0.0)[1]
    names = [f"blocks.{i}.mlp.down.kernel" for i in range(2)]
    kernels = {name: jnp.asarray(np.matmul(*best_low_rank(dense.parameter(name), rank))) for name in names}
    truncated = dense.rebuilt(dense.config, kernels)
    for model in (ours, truncated):
        assert model.module().blocks.plan == ((1, 2),)
    assert measured(ours) == pytest.approx(measured(truncated), rel=1e-5)


def test_layers_of_other_rank_share_one_program_by_columns_of_zeros_and_are_stored(dense, tmp_path):
    fit = Fit(dense, work(), sites_of(dense.config, "inputs", SITES), 0.4)
    rho = {site: 0.5 if site.startswith("blocks.0") else 0.9 for site in fit.sites}
    model = fit.placed(rho, fit.static_ranks([rho]))
    assert model.module().blocks.plan == ((1, 2),)
    for site in fit.sites:
        a, b = (np.asarray(model.parameter(f"{site}.weights.0.{name}")) for name in "ab")
        used = np.flatnonzero(np.any(a != 0, axis=0))
        rank = fit.budget(site, rho[site])[1]
        assert used.tolist() == list(range(rank)) and np.count_nonzero(np.any(b != 0, axis=1)) == rank
    model_folder.save(model, tmp_path / "out")
    again = model_folder.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.values, model.values)
    assert float(measured(again)) == float(measured(model))


def test_the_search_is_no_worse_than_its_start_and_resumes(dense, tmp_path):
    recipe = [RSparse(0.5, rho=0.9, search=True, sites="blocks.*.mlp.down", seed=1)]
    notes = work(folder=tmp_path)
    first = run_recipe(recipe, dense, notes)
    found = notes.notes["0-rsparse"]
    history = found["loss_by_generation"]
    assert len(history) == 3 and all(b <= a for a, b in zip(history, history[1:], strict=False))
    assert measured(first, TOKENS[:2]) == pytest.approx(history[-1], rel=1e-5)
    assert any(path.name.startswith("0-rho") for path in tmp_path.iterdir())
    again = run_recipe(recipe, dense, work(folder=tmp_path))
    jax.tree.map(np.testing.assert_array_equal, again.values, first.values)


def test_what_cannot_be_done_is_refused_by_name(dense):
    with pytest.raises(ConfigError, match=r"rsparse: rho = 1.5: must be in \[0, 1\]"):
        RSparse(rho=1.5).check(dense.config)
    with pytest.raises(ConfigError, match="rank = 0: must be at least 1"):
        dense.with_rules(weights=("blocks.*.mlp.down=low_rank_residual:0",))
