"""TEAL: thresholds drop what they say, in every form of execution, and sparsity 0 is the dense model."""

import dataclasses
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compress.allocators import FixedRatio, Greedy, Uniform
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.compress.statistics import Quantiles
from sparsejax.compress.surgery import sites_of
from sparsejax.context import Context
from sparsejax.methods.sparsity.selection import Threshold, TopK
from sparsejax.methods.sparsity.teal import Teal
from sparsejax.nnx_compat import merge
from sparsejax.plugs import ConfigError
from tests.compress.tiny import tiny_model

TOKENS = np.random.default_rng(0).integers(0, 250, (4, 32)).astype(np.int32)


def work(**fields):
    return Work(Calibration(CalibrationSpec(sequences=4, length=32), TOKENS, ""), TIERS["quick"], **fields)


def logits(model):
    run = jax.jit(lambda values: merge(model.structure, values)({"tokens": TOKENS}, Context(mode="prefill"))[0])
    return np.asarray(run(model.values))


@pytest.fixture(scope="module")
def dense():
    return tiny_model(layers=2)


def realised(dense, sparse, site):
    """The share of zeros at a site's input when its block reads the dense model's activations of the calibration."""
    _, layer, part, name = site.split(".")
    h = dict(Blocks(dense).stream(TOKENS))[int(layer)]
    entering = Blocks(dense).tensors(int(layer), h, f"{part}.{name}")[1][f"{part}.{name}"]
    threshold = float(sparse.parameter(f"{site}.inputs.0.threshold"))
    return float(np.mean(np.abs(entering) <= threshold)), entering.size


@pytest.mark.parametrize("select", ["threshold", "topk"])
def test_sparsity_zero_is_the_dense_model_bit_for_bit(dense, select):
    sparse = run_recipe([Teal(0.0, select)], dense, work())
    assert sparse.config == dense.config
    np.testing.assert_array_equal(logits(sparse), logits(dense))


def test_each_site_drops_the_share_it_was_given_of_the_calibration(dense):
    notes = work()
    sparse = run_recipe([Teal(0.45, allocator=FixedRatio())], dense, notes)
    assert notes.notes["0-teal"]["planned_sparsity"] == pytest.approx(0.45)
    for site in ("blocks.0.attn.q", "blocks.0.attn.o", "blocks.1.mlp.down", "blocks.1.mlp.up"):
        found, count = realised(dense, sparse, site)
        assert found == pytest.approx(notes.notes["0-teal"]["plan"][site], abs=2 / count)
    assert not np.array_equal(logits(sparse), logits(dense))


def test_an_interrupted_compression_goes_on_to_the_same_model(dense, tmp_path):
    recipe = [Teal(0.2, sites="blocks.*.mlp.down")]
    first = run_recipe(recipe, dense, work(folder=tmp_path))
    kept = sorted(tmp_path.iterdir())
    assert len([path for path in kept if "quantiles" in path.name]) == len([p for p in kept if "greedy" in p.name]) / 2 == 2
    kept[0].unlink()
    kept[-1].unlink()
    again = run_recipe(recipe, dense, work(folder=tmp_path))
    jax.tree.map(np.testing.assert_array_equal, again.values, first.values)


def test_gaussian_inputs_lose_the_energy_that_the_law_says():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((128, 4096)), rng.standard_normal((4096, 512))
    normal = NormalDist()
    for sparsity in (0.25, 0.5, 0.65):
        z = normal.inv_cdf((1 + sparsity) / 2)
        kept = np.asarray(Threshold()({"threshold": jnp.float32(Quantiles(np.abs(x))(sparsity))}, jnp.asarray(x, jnp.float32),
                                      Context()).mask)
        measured = np.sum(((x * ~kept) @ w) ** 2) / np.sum((x @ w) ** 2)
        assert measured == pytest.approx(sparsity - 2 * z * normal.pdf(z), rel=0.02)


def test_masked_gathered_and_topk_forms_agree_where_tokens_share_their_magnitudes():
    rng = np.random.default_rng(1)
    magnitudes = rng.exponential(size=64).astype(np.float32)
    x = np.stack([rng.permutation(magnitudes) * rng.choice([-1, 1], 64) for _ in range(5)]).astype(np.float32)
    w = rng.standard_normal((64, 16)).astype(np.float32)
    threshold = Threshold()({"threshold": jnp.float32(Quantiles(np.abs(x))(0.5))}, jnp.asarray(x), Context())
    topk = TopK(fitted=True)({"count": jnp.float32(32)}, jnp.asarray(x), Context())
    np.testing.assert_array_equal(threshold.mask, topk.mask)
    for row, mask in zip(x, np.asarray(threshold.mask), strict=True):
        indices = np.flatnonzero(mask)
        np.testing.assert_allclose((row * mask) @ w, row[indices] @ w[indices], rtol=1e-5, atol=1e-5)


def test_topk_keeps_the_rounded_count_of_every_token(dense):
    sparse = run_recipe([Teal(0.4, "topk", Uniform(), sites="blocks.*.{mlp.down,attn.v}")], dense, work())
    assert sparse.config.inputs == ("blocks.*.attn.v=topk:fitted=true,score=magnitude",
                                    "blocks.*.mlp.down=topk:fitted=true,score=magnitude")
    hidden = Blocks(sparse).tensors(1, Blocks(dense).embed(TOKENS), "mlp.hidden")[1]["mlp.hidden"]
    assert (np.sum(hidden != 0, axis=-1) == round(64 * 0.6)).all()


def test_what_cannot_be_done_is_refused_before_any_work(dense):
    for recipe, message in (
        (Teal(1.0), r"teal: sparsity = 1.0: must be in \[0, 1\)"),
        (Teal(0.5, "top-k"), "Did you mean 'topk'"),
        (Teal(0.5, sites="blocks.*.mlp.dwon"), "names no site"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_recipe([recipe], dense.config)
    with pytest.raises(ConfigError, match="allowed are the maps"):
        check_recipe([Teal(sites="**")], dataclasses.replace(dense.config, tied_embeddings=False))
    assert Teal(0.4).cost(dense.config, TIERS["quick"]).startswith("2 blocks x")
    assert len(sites_of(dense.config, "inputs", Teal().sites)) == 14 and isinstance(Teal().allocator, Greedy)
