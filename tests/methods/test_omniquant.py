"""Learned weight clipping: its ends, its gradients, and what it does to the loss of blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.recipes import omniquant as recipe
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.compress.scaling import logits
from sparsejax.methods.quant.omniquant import OmniQuant, clipped, learnable
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import QTensor, qtensor
from tests.compress import tiny

tiny_model = functools.cache(functools.partial(tiny.tiny_model, layers=2))
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 32), np.int32)
FORMAT, SITES = "int2:asym,group=16", "blocks.*.{attn.o,mlp.down}"
KERNEL = jax.random.normal(jax.random.key(0), (24, 5))


def work(folder=None):
    return Work(Calibration(CalibrationSpec(sequences=4, length=32), TOKENS, ""), TIERS["quick"], folder)


def given(spec, **values):
    groups = -(-24 // spec.block((24, 5))[0])
    return {name: jnp.full((groups, 5), value, jnp.float32) for name, value in values.items()}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    using = work(folder)
    return run_recipe([OmniQuant(FORMAT, 8, 0.05, SITES)], tiny_model(), using), using.notes["0-omniquant"], folder


@pytest.mark.parametrize("text", ["int3:asym,group=16,ragged=tail", "int4"])
def test_without_clipping_it_is_rounding_to_nearest_and_trains_on_what_is_stored(text):
    spec = FormatSpec.parse(text)
    sides = ("high", "low") if spec.symmetric == "asym" else ("high",)
    nearest = qtensor(KERNEL, spec, within=clipped(KERNEL, spec, given(spec, **dict.fromkeys(sides, np.inf))))
    jax.tree.map(np.testing.assert_array_equal, nearest, qtensor(KERNEL, spec))
    some = given(spec, **dict(zip(sides, (0.3, 1.0), strict=False)))
    stored = qtensor(KERNEL, spec, within=clipped(KERNEL, spec, some))
    np.testing.assert_allclose(learnable(KERNEL, spec, some), stored.dequantize(), atol=1e-6)
    greatest = np.abs(stored.dequantize()).max()
    assert greatest < 0.85 * np.abs(nearest.dequantize()).max()


def test_gradients_of_symmetric_ranges_are_those_of_a_learned_step_size():
    spec, u = FormatSpec("int4"), 0.7
    coefficients = np.asarray(jax.random.normal(jax.random.key(1), KERNEL.shape), np.float64)
    found = jax.grad(lambda u: jnp.sum(learnable(KERNEL, spec, {"high": u}) * coefficients))(jnp.full((1, 5), u))
    w = np.asarray(KERNEL, np.float64)
    share, largest = 1 / (1 + np.exp(-u)), np.abs(w).max(0)
    v = w / (share * largest / 7)
    by_step = np.where(np.abs(v) <= 7.5, np.round(v) - v, 7 * np.sign(v))  # Esser et al., 1902.08153, equation 3
    wanted = (coefficients * by_step).sum(0) * largest / 7 * share * (1 - share)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-3, atol=1e-4)


def test_gradients_of_asymmetric_ranges_raise_what_is_pulled_outwards():
    spec = FormatSpec.parse("int4:asym")
    largest = jnp.zeros_like(KERNEL).at[jnp.argmax(KERNEL, 0), jnp.arange(5)].set(1)
    least = jnp.zeros_like(KERNEL).at[jnp.argmin(KERNEL, 0), jnp.arange(5)].set(1)
    at = given(spec, high=0.0, low=0.0)
    highs, lows = (jax.grad(lambda g, one=one: jnp.sum(learnable(KERNEL, spec, g) * one))(at) for one in (largest, least))
    assert (highs["high"] > 0).all() and (lows["low"] < 0).all()


def test_the_loss_of_every_block_falls_below_rounding_to_nearest(learned):
    model, note, _ = learned
    assert note["formats"] == [FORMAT] and len(note["block_losses"]["learned"]) == 2
    for nearest, after in zip(note["block_losses"]["nearest"], note["block_losses"]["learned"], strict=True):
        assert after < 0.95 * nearest
    wanted = logits(tiny_model(), TOKENS)
    rounded = run_recipe([Rtn(FORMAT, SITES)], tiny_model(), work())
    errors = [np.square(logits(one, TOKENS) - wanted).mean() for one in (model, rounded)]
    assert errors[0] < errors[1]
    kernel = model.parameter("blocks.1.mlp.down.kernel")
    assert isinstance(kernel, QTensor) and str(kernel.spec) == FORMAT


def test_what_was_interrupted_goes_on_at_its_block_to_the_same_bits(learned):
    model, _, folder = learned
    (folder / "0-block1.npz").unlink()
    again = run_recipe([OmniQuant(FORMAT, 8, 0.05, SITES)], tiny_model(), work(folder))
    jax.tree.map(np.testing.assert_array_equal, again.values, model.values)


def test_a_block_keeps_rounding_to_nearest_where_learning_did_not_help():
    using = work()
    one = OmniQuant("int8", 1, 100.0, sites="blocks.0.attn.o")  # a rate that throws the ranges away
    model = run_recipe([one], tiny_model(), using)
    rounded = run_recipe([Rtn("int8", sites="blocks.0.attn.o")], tiny_model(), work())
    jax.tree.map(np.testing.assert_array_equal, model.values, rounded.values)
    losses = using.notes["0-omniquant"]["block_losses"]
    assert losses["learned"] == losses["nearest"]


def test_recipes_and_options_are_checked_by_name():
    assert recipe.get_recipe("int2:asym/40") == [OmniQuant("int2:asym", 40)] and recipe.get_recipe("") == [OmniQuant()]
    with pytest.raises(ConfigError, match="omniquant: epochs = 'x'"):
        recipe.get_recipe("int4/x")
    bad = {"nf4:group=16": "expected integers", "int4:asym,zero=float": "expected integers", "int4:full15": "expected integers",
           "int4:tensor": "expected integers", "int4:group=24": "no multiple of 24"}  # fmt: skip
    for text, message in bad.items():
        with pytest.raises(ConfigError, match=message):
            check_recipe([OmniQuant(text)], tiny_model().config)
    for one, message in ((OmniQuant("int4", 0), "epochs = 0"), (OmniQuant("int4", 1, -1.0), "rate = -1.0")):
        with pytest.raises(ConfigError, match=message):
            check_recipe([one], tiny_model().config)
