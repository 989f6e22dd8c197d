"""SmoothQuant against its card, and W8A8 as a recipe."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.recipes import smoothquant as recipe
from sparsejax.compress.allocators import Uniform
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.compress.scaling import logits
from sparsejax.io import model_folder
from sparsejax.methods.quant.inputs import QuantizedInputs
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.methods.quant.smoothquant import SmoothQuant, smooth_scales
from sparsejax.methods.sparsity.teal import Teal
from sparsejax.plugs import ConfigError
from tests.compress import tiny

TOKENS = np.random.default_rng(0).integers(0, 256, (8, 32), np.int32)


@functools.cache
def outlier_model():
    """Two blocks with three channels behind each norm fifty times the others."""
    model, arrays = tiny.tiny_model(layers=2), {}
    for name in (f"blocks.{layer}.{norm}.gain" for layer in range(2) for norm in ("attn_norm", "mlp_norm")):
        arrays[name] = model.parameter(name).at[jnp.array([3, 11, 20])].multiply(50.0)
    for name in (f"blocks.{layer}.{site}.kernel" for layer in range(2) for site in ("attn.q", "attn.k", "mlp.gate", "mlp.up")):
        arrays[name] = model.parameter(name).at[jnp.array([3, 11, 20])].divide(50.0)
    return model.rebuilt(model.config, arrays)


def work():
    return Work(Calibration(CalibrationSpec(sequences=8, length=32), TOKENS, ""), TIERS["quick"])


def test_the_golden_scales_of_the_card():
    x, w = np.array([8, 0.5, 2, 1]), np.array([0.5, 1, 0.25, 2])
    np.testing.assert_allclose(smooth_scales(x, w, 0.5), [4, 0.70711, 2.82843, 0.70711], atol=1e-5)
    np.testing.assert_allclose(smooth_scales(x, w, 0.85), [6.49802, 0.55478, 2.21914, 0.90125], atol=1e-5)


@given(st.integers(0, 10**6))
def test_the_ends_give_all_channels_of_one_side_the_maximum_one_and_the_middle_equals_both(seed):
    x, w = np.exp(np.random.default_rng(seed).normal(size=(2, 9)))
    np.testing.assert_allclose(x / smooth_scales(x, w, 1.0), 1)
    np.testing.assert_allclose(w * smooth_scales(x, w, 0.0), 1)
    s = smooth_scales(x, w, 0.5)
    np.testing.assert_allclose(x / s, w * s)


def test_a_smoothed_model_is_the_same_function_with_equal_maxima():
    using = work()
    smoothed = run_recipe([SmoothQuant(0.5)], outlier_model(), using)
    assert using.notes["0-smoothquant"]["equivalence"] < 1e-5
    blocks = Blocks(smoothed)
    h, _ = blocks.run(0, blocks.embed(TOKENS))
    x = np.abs(np.asarray(blocks.tensors(1, h, "mlp.up")[1]["mlp.up"])).max((0, 1))
    kernels = [np.abs(np.asarray(smoothed.parameter(f"blocks.1.mlp.{name}.kernel"))).max(1) for name in ("gate", "up")]
    np.testing.assert_allclose(x, np.max(kernels, axis=0), rtol=1e-4)


def test_smoothing_makes_eight_bits_of_both_better_and_the_folder_gives_the_same_bits(tmp_path):
    dense = logits(outlier_model(), TOKENS)
    models = {arg: run_recipe(recipe.get_recipe(arg), outlier_model(), work()) for arg in ("off", "0.5")}
    errors = {arg: np.mean(np.square(logits(model, TOKENS) - dense)) for arg, model in models.items()}
    assert errors["0.5"] < 0.3 * errors["off"], errors
    model_folder.save(models["0.5"], tmp_path / "out")
    np.testing.assert_array_equal(logits(model_folder.load(tmp_path / "out"), TOKENS), logits(models["0.5"], TOKENS))


def test_integers_of_sparse_inputs_in_one_recipe_count_as_sparse():
    passes = [Rtn("int8"), Teal(0.5, allocator=Uniform()), QuantizedInputs("int8")]
    model = run_recipe(passes, outlier_model(), work())
    assert "|int8" in model.config.inputs[0]
    blocks = Blocks(model)
    down = np.asarray(blocks.tensors(0, blocks.embed(TOKENS), "mlp.down")[1]["mlp.down"])
    assert 0.35 < np.mean(down == 0) < 0.65


def test_what_makes_no_sense_is_refused():
    config = outlier_model().config
    for passes, message in [
        ([SmoothQuant(1.5)], r"alpha = 1.5: must be in \[0, 1\]"),
        ([QuantizedInputs("int9")], "inputs: op.*int9"),
        ([QuantizedInputs(), SmoothQuant()], "changes weights after quantizedinputs has fitted activations"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_recipe(passes, config)
    with pytest.raises(ConfigError, match="alpha = 'half': expected a number"):
        recipe.get_recipe("half")
