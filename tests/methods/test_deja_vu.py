"""Deja Vu's predictors and PowerInfer's statistics: sizes, labels, metrics, training, and a reordering that changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, run_recipe
from sparsejax.context import Context
from sparsejax.methods.sparsity.activity import active, contribution
from sparsejax.methods.sparsity.deja_vu import DejaVu, Predictor, affordable_rank, prediction
from sparsejax.methods.sparsity.powerinfer import REPORTED, ReorderNeurons, by_frequency, coverage, tile_survival
from sparsejax.nnx_compat import merge
from sparsejax.plugs import ConfigError, resolve
from tests.compress.tiny import tiny_model

TOKENS = np.random.default_rng(1).integers(0, 256, (16, 64)).astype(np.int32)


def work(folder=None):
    return Work(Calibration(CalibrationSpec(sequences=16, length=64), TOKENS, ""), TIERS["quick"], folder)


def logits(model):
    run = jax.jit(lambda values: merge(model.structure, values)({"tokens": TOKENS[:2]}, Context(mode="prefill"))[0])
    return np.asarray(run(model.values))


def test_the_rank_keeps_a_predictor_within_five_percent_of_its_ffn():
    assert affordable_rank(576, 1536, 3) == 62  # SmolLM2
    for width, hidden, maps in ((64, 256, 2), (4096, 11008, 3)):
        rank = affordable_rank(width, hidden, maps)
        assert rank * (width + hidden) <= 0.05 * maps * width * hidden < (rank + 1) * (width + hidden)


def test_the_predictor_is_two_maps_and_keeps_exactly_k_or_what_exceeds_its_threshold():
    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 12), (12, 4), (4, 30)))
    for relu in (False, True):
        middle = np.asarray(x, np.float64) @ a
        z = np.maximum(middle, 0) @ b if relu else middle @ b
        chosen = Predictor(4, k=7, relu=relu)({"a": a, "b": b}, x, None, Context())
        assert (np.asarray(chosen).sum(-1) == 7).all()
        assert np.asarray(z)[np.asarray(chosen)].min() >= np.sort(z, axis=-1)[..., -7].min() - 1e-4
        above = Predictor(4, relu=relu)({"a": a, "b": b, "threshold": jnp.float32(0.3)}, x, None, Context())
        np.testing.assert_array_equal(above, z > 0.3)


@given(seed=st.integers(0, 2**16), density=st.floats(0.05, 0.95))
def test_labels_are_a_relu_s_own_zeros_or_the_largest_contributions(seed, density):
    rng = np.random.default_rng(seed)
    h, down = rng.normal(size=(40, 24)).astype(np.float32), rng.normal(size=(24, 8)).astype(np.float32)
    sizes = contribution(h, down)
    np.testing.assert_allclose(sizes, np.abs(h) * np.linalg.norm(down, axis=1), rtol=1e-5)
    assert abs(active(sizes, False, density).mean() - density) <= 2 / h.size
    positive = np.maximum(h, 0)
    np.testing.assert_array_equal(active(contribution(positive, down), True, density), positive > 0)


@given(seed=st.integers(0, 2**16))
def test_metrics_are_counts_and_the_missed_mass_bounds_the_error(seed):
    rng = np.random.default_rng(seed)
    h, down = np.maximum(rng.normal(size=(10, 16)), 0), rng.normal(size=(16, 6))
    labels, chosen, output = h > 0, rng.random(h.shape) < 0.5, np.linalg.norm(h @ down, axis=1)
    found = prediction(chosen, labels, contribution(h, down.astype(np.float32)), output)
    assert found["density"] == chosen.mean()
    assert found["recall"] == pytest.approx(np.mean(chosen[labels]))
    assert found["precision"] == pytest.approx(labels[chosen].mean())
    error = np.linalg.norm((h * ~chosen) @ down, axis=1) / output
    assert found["missed_mass"] >= error.mean() - 1e-5
    assert prediction(labels, labels, contribution(h, down), output) == {
        "recall": 1.0, "precision": 1.0, "density": labels.mean(), "missed_mass": 0.0
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model, its predictors, what was noted, and the folder of the pieces."""
    model, folder = tiny_model(layers=2, unroll=1, activation="relu"), tmp_path_factory.mktemp("pieces")
    done = work(folder)
    fitted = run_recipe([DejaVu(0.3, rank=16, batch=64, epochs=30, learning_rate=1e-2)], model, done)
    return model, fitted, done.notes["0-dejavu"], folder


def test_a_trained_predictor_finds_the_active_units_and_is_noted_with_its_bytes(trained):
    model, fitted, notes, _ = trained
    assert fitted.config.neurons == ("blocks.*.mlp=predictor:16,k=45,relu=false",)
    for layer in range(2):
        # Units by chance: recall .7. Half of the units of a random ReLU network are active.
        assert notes["recall"][layer] > 0.85 and 0.6 < notes["precision"][layer] <= 1
        assert notes["density"][layer] == pytest.approx(45 / 64, abs=1e-4) and 0 < notes["missed_mass"][layer] < 0.6
    assert notes["predictor_bytes_of_ffn"] == 16 * (32 + 64) / (2 * 32 * 64) and notes["rank"] == 16
    dense, sparse = logits(model), logits(fitted)
    rng, shapes = np.random.default_rng(0), {"a": (32, 16), "b": (16, 64)}
    drawn = {f"blocks.{i}.mlp.neurons.{name}": rng.normal(size=shape) for i in range(2) for name, shape in shapes.items()}
    random = fitted.rebuilt(fitted.config, {name: jnp.asarray(value, jnp.float32) for name, value in drawn.items()})
    assert np.abs(sparse - dense).mean() < 0.5 * np.abs(logits(random) - dense).mean()


def test_an_interrupted_training_goes_on_from_the_blocks_that_are_kept(trained):
    model, fitted, _, folder = trained
    assert sorted(path.name for path in folder.iterdir()) == ["0-block-0.npz", "0-block-1.npz"]
    # Other options, the same pieces: nothing is trained again.
    again = run_recipe([DejaVu(0.3, rank=16, epochs=1)], model, work(folder))
    np.testing.assert_array_equal(logits(again), logits(fitted))


def test_a_threshold_keeps_the_asked_share_and_positives_may_weigh_by_mass():
    model, done = tiny_model(layers=1), work()
    one = DejaVu(0.6, rank=8, relu=True, select="threshold", mass=True, batch=64, epochs=5, learning_rate=1e-2)
    fitted = run_recipe([one], model, done)
    notes = done.notes["0-dejavu"]
    assert fitted.config.neurons == ("blocks.*.mlp=predictor:8,k=0,relu=true",)
    assert notes["density"][0] == pytest.approx(0.4, abs=0.05) and notes["recall"][0] > 0.48  # by chance .4
    assert run_recipe([DejaVu(0.0)], model, work()) is model


def test_what_cannot_be_predicted_is_refused():
    config = tiny_model(layers=1).config
    wrong = {"select = 'top'": DejaVu(select="top"), "rank = -1": DejaVu(rank=-1), "sparsity": DejaVu(1.5),
             "epochs": DejaVu(epochs=0)}  # fmt: skip
    for message, one in wrong.items():
        with pytest.raises(ConfigError, match=message):
            one.check(config)
    with pytest.raises(ConfigError, match="already have a selector"):
        DejaVu().check(dataclasses.replace(config, neurons=("blocks.*.mlp=predictor:4",)))
    with pytest.raises(ConfigError, match="rank"):
        resolve("neuron_selector", "predictor:0")


@given(seed=st.integers(0, 2**16))
def test_coverage_is_concave_from_zero_to_one_and_a_frequency_order_leaves_no_more_tiles(seed):
    rng = np.random.default_rng(seed)
    rates = rng.pareto(1.0, 64) / 8
    activity = rng.random((30, 64)) < np.clip(rates, 0, 1)
    activity[0, 0] = True
    frequency = activity.sum(0)
    curve = np.array([coverage(frequency, q) for q in np.linspace(0, 1, 33)])
    assert curve[0] == 0 and curve[-1] == pytest.approx(1) and (np.diff(curve, 2) <= 1e-12).all()
    order = by_frequency(frequency)
    hot = order[:16]
    assert coverage(frequency, 16 / 64) == pytest.approx(frequency[hot].sum() / frequency.sum())
    assert tile_survival(activity[:, order], 64) == tile_survival(activity, 64)
    assert tile_survival(activity[:, order], 1) == tile_survival(activity, 1) == activity.mean()


def test_the_sum_over_units_may_be_cut_between_hot_and_cold():
    rng = np.random.default_rng(0)
    h, down = rng.normal(size=(5, 64)), rng.normal(size=(64, 8))
    order = by_frequency((h > 0).sum(0))
    hot, cold = order[:20], order[20:]
    np.testing.assert_allclose(h[:, hot] @ down[hot] + h[:, cold] @ down[cold], h @ down, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_reordering_by_frequency_keeps_the_function_and_puts_the_hot_units_first(activation):
    model, done = tiny_model(layers=2, unroll=1, activation=activation), work()
    ordered = run_recipe([ReorderNeurons(density=0.2, tile=8)], model, done)
    np.testing.assert_allclose(logits(ordered), logits(model), atol=1e-5)
    notes = done.notes["0-reorderneurons"]
    for layer in range(2):
        assert notes["active"][layer][0] == pytest.approx(0.5 if activation == "relu" else 0.2, abs=0.06)
        assert all(cov > share for cov, share in zip(notes["coverage"][layer], REPORTED, strict=True))
        before, after = notes["tile_survival"][layer]
        assert after <= before
    again = work()
    run_recipe([ReorderNeurons(density=0.2, tile=8)], ordered, again)
    assert again.notes["0-reorderneurons"]["coverage"] == notes["coverage"]
    before, after = again.notes["0-reorderneurons"]["tile_survival"][0]
    assert before == after == notes["tile_survival"][0][1]
