"""CATS and CHESS against the cards' oracles: thresholds, masks, invariances, and the gathered execution."""

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
from sparsejax.methods.sparsity.cats import Cats, capacity, gathered_ffn
from sparsejax.methods.sparsity.chess import Chess
from sparsejax.methods.sparsity.gate_threshold import GateThreshold
from sparsejax.nnx_compat import merge
from sparsejax.plugs import ConfigError, resolve
from tests.compress.tiny import tiny_model

TOKENS = np.random.default_rng(1).integers(0, 256, (4, 32)).astype(np.int32)


def work(folder=None, skip_first=0):
    spec = CalibrationSpec(sequences=4, length=32, skip_first=skip_first)
    return Work(Calibration(spec, TOKENS, ""), TIERS["quick"], folder)


def logits(model):
    run = jax.jit(lambda values: merge(model.structure, values)({"tokens": TOKENS}, Context(mode="prefill"))[0])
    return np.asarray(run(model.values))


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=2, unroll=1)


def samples(seed, tokens=50, hidden=24):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(tokens, hidden)).astype(np.float32) * np.exp(rng.normal(size=hidden)).astype(np.float32)
    return a, (rng.normal(size=(tokens, hidden)) * np.exp(rng.normal(size=hidden))).astype(np.float32)


def chess_threshold(a, u, s, moment, wd_norm):
    """The card's oracle, with the quantile that strict > needs."""
    a, u = a.astype(np.float64), u.astype(np.float64)
    r = np.sqrt((u**2).mean(0)) if moment == 2 else np.abs(u).mean(0)
    r = r if wd_norm is None else r * wd_norm
    return np.quantile(np.abs(a) * r, s, method="inverted_cdf") / r


@given(seed=st.integers(0, 2**16), s=st.floats(0.05, 0.95), moment=st.sampled_from([1, 2]), with_down=st.booleans())
def test_chess_thresholds_are_the_card_s_and_realise_the_sparsity(seed, s, moment, with_down):
    a, u = samples(seed)
    down = np.random.default_rng(seed).normal(size=(24, 8)) if with_down else None
    norms = np.linalg.norm(down, axis=1) if with_down else None
    found = Chess(s, moment=moment, w_down=with_down).threshold(a, u, down)
    np.testing.assert_allclose(found, chess_threshold(a, u, s, moment, norms), rtol=1e-5)
    assert abs(np.mean(np.abs(a) <= found) - s) <= 3 / a.size


@given(seed=st.integers(0, 2**16), s=st.floats(0.05, 0.95), size=st.floats(0.1, 10))
def test_chess_of_units_that_are_equally_large_is_cats(seed, s, size):
    a, _ = samples(seed)
    signs = np.where(np.random.default_rng(seed).random(a.shape) < 0.5, size, -size).astype(np.float32)
    np.testing.assert_allclose(Chess(s).threshold(a, signs, None), Cats(s).threshold(a, signs, None), rtol=1e-6)


def test_rescaling_a_unit_moves_chess_and_leaves_cats_and_chess_with_the_down_norm():
    (a, u), down = samples(0), np.random.default_rng(2).normal(size=(24, 8))
    factor = np.exp(np.random.default_rng(3).normal(size=24)).astype(np.float32)
    scaled = u * factor, down / factor[:, None]

    def mask(one, u, down):
        return np.abs(a) > one.threshold(a, u, down if one.reads_down else None)

    for one in (Cats(0.5), Chess(0.5, w_down=True), Chess(0.5, moment=1, w_down=True)):
        assert np.mean(mask(one, u, down) != mask(one, *scaled)) <= 2 / a.size
    assert np.mean(mask(Chess(0.5), u, down) != mask(Chess(0.5), *scaled)) > 0.05


@pytest.mark.parametrize("one", [Cats, Chess])
def test_a_larger_sparsity_keeps_a_subset(one):
    a, u = samples(4)
    masks = [np.abs(a) > one(s).threshold(a, u, None) for s in (0.3, 0.5, 0.7)]
    assert all((large <= small).all() for small, large in zip(masks, masks[1:], strict=False))


def test_a_dead_up_channel_has_a_finite_threshold():
    a, u = samples(5)
    u[:, 3] = 0
    for values in (u, np.zeros_like(u)):
        assert np.isfinite(Chess(0.5).threshold(a, values, None)).all()
    assert Chess(0.5).threshold(a, u, None)[3] > 1e3 * np.abs(a[:, 3]).max()


def test_a_relu_gate_at_threshold_zero_loses_nothing():
    model = tiny_model(layers=1, activation="reglu")
    ruled = model.with_rules({"blocks.0.mlp.neurons.threshold": jnp.float32(0)}, neurons=("blocks.*.mlp=gate_threshold",))
    np.testing.assert_array_equal(logits(ruled), logits(model))


@pytest.mark.parametrize("one", [Cats(0.6), Chess(0.4, moment=1, w_down=True, attention=True)])
def test_a_fitted_model_realises_the_sparsity_in_one_program_for_all_layers(model, one):
    done = work()
    fitted = run_recipe([one], model, done)
    assert fitted.module().blocks.plan == ((1, 2),)
    assert fitted.config.neurons == (f"blocks.*.mlp=gate_threshold{':channels=true' * one.channels}",)
    realised = done.notes[f"0-{one.name}"]["neuron_sparsity"]
    assert list(realised) == [0, 1] and np.allclose(list(realised.values()), one.sparsity, atol=1e-3)
    assert len(fitted.config.inputs) == 2 * getattr(one, "attention", False)
    assert np.isfinite(logits(fitted)).all()


def test_the_first_tokens_can_be_left_out_of_the_statistics_and_pieces_are_kept(model, tmp_path):
    first, again, late = (
        float(run_recipe([Cats(s)], model, one).parameter("blocks.1.mlp.neurons.threshold"))
        for s, one in ((0.5, work(tmp_path / "pieces")), (0.9, work(tmp_path / "pieces")), (0.5, work(skip_first=8)))
    )
    assert first == again != late  # what was kept is not fitted again


def test_sparsity_zero_is_bitwise_dense_and_places_nothing(model):
    for one in (Cats(0.0), Chess(0.0)):
        assert run_recipe([one], model, work()) is model


def test_what_cannot_be_thresholded_is_refused_by_name(model):
    plain = tiny_model(layers=1, activation="relu2").config
    refused = {
        "activation.*'relu2'": (Cats(), plain), "moment = 3": (Chess(moment=3), model.config),
        "sparsity = 1": (Cats(1.0), model.config),
        "already have a selector": (Cats(), dataclasses.replace(model.config, neurons=("blocks.*.mlp=gate_threshold",))),
    }  # fmt: skip
    for message, (one, config) in refused.items():
        with pytest.raises(ConfigError, match=message):
            one.check(config)
    assert resolve("pass", "chess:0.3,moment=1,attention=true") == Chess(0.3, moment=1, attention=True)


def case(seed=0, width=16, hidden=256):
    rng = np.random.default_rng(seed)
    shapes = (width,), (hidden,), (width, hidden), (hidden, width)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@given(seed=st.integers(0, 2**16), t=st.floats(0, 2.5), channels=st.booleans())
def test_the_gathered_ffn_is_the_masked_one_and_says_when_units_were_lost(seed, t, channels):
    x, a, up, down = case(seed)
    threshold = jnp.full(256, t) if channels else jnp.float32(t)
    room = 128
    mask = np.asarray(GateThreshold(channels)({"threshold": threshold}, x, jnp.asarray(a), Context()))
    y, lost = jax.jit(gathered_ffn, static_argnums=5)(x, a, up, down, threshold, room)
    assert bool(lost) == (mask.sum() > room)
    kept = mask & (np.cumsum(mask) <= room)
    np.testing.assert_allclose(y, ((a * kept) * (x.astype(np.float64) @ up)) @ down, rtol=1e-4, atol=2e-4)


def test_capacity_has_a_quarter_to_spare_in_whole_tiles_and_never_exceeds_the_width():
    assert [capacity(1536, s) for s in (0.1, 0.5, 0.7, 0.9)] == [1536, 1024, 640, 256]
    assert capacity(64, 0.5) == 64
