"""OutlierTune: scales of channels in the weights, shifts in the biases, and integers between."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.recipes import outliertune as recipe
from sparsejax.arrays import QuantizedActivation, SparseActivation, matmul
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.compress.scaling import logits
from sparsejax.compress.statistics import Range
from sparsejax.context import Context
from sparsejax.io import model_folder
from sparsejax.methods.quant.outliertune import ChannelCodes, OutlierTune, channel_scales
from sparsejax.methods.quant.spikes import SpikeAware
from sparsejax.models.config import AttentionConfig, FFNConfig, NormConfig
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import qtensor
from tests.compress import tiny

TOKENS = np.random.default_rng(0).integers(0, 256, (4, 32), np.int32)
OUTLIERS = jnp.array([3, 11, 20])


def work():
    return Work(Calibration(CalibrationSpec(sequences=4, length=32), TOKENS, ""), TIERS["quick"])


@functools.cache
def biased_model():
    """LayerNorm and biases as in OPT; three channels that enter networks are 30 times as large, and shifted."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=4, bias=True, out_bias=True)
    ffn = FFNConfig(hidden=64, activation="gelu", bias=True)
    model, arrays = tiny.tiny_model(layers=2, norm=NormConfig(kind="layer", bias=True), attention=attention, ffn=ffn), {}
    for layer in range(2):
        norm, up = f"blocks.{layer}.mlp_norm", f"blocks.{layer}.mlp.up.kernel"
        arrays[f"{norm}.gain"] = model.parameter(f"{norm}.gain").at[OUTLIERS].multiply(30)
        arrays[f"{norm}.bias"] = model.parameter(f"{norm}.bias").at[OUTLIERS].set(100)
        arrays[up] = model.parameter(up).at[OUTLIERS].divide(30)
    return model.rebuilt(model.config, arrays)


@functools.cache
def tuned():
    using = work()
    return run_recipe([OutlierTune()], biased_model(), using), using.notes["0-outliertune"]


@given(st.integers(0, 10**6), st.booleans())
def test_shift_and_scale_change_nothing_in_floats_and_cover_the_range(seed, symmetrize):
    rng = np.random.default_rng(seed)
    x, w, b = rng.normal(rng.normal(size=6), 3, (9, 6)), rng.normal(size=(6, 4)), rng.normal(size=4)
    scale, center = channel_scales(Range(x.min(0), x.max(0)), 31, symmetrize)
    codes = (x - center) / scale
    np.testing.assert_allclose(codes @ (scale[:, None] * w) + b + center @ w, x @ w + b, atol=1e-4)
    np.testing.assert_allclose(np.abs(codes).max(0), 31, rtol=1e-5)
    if symmetrize:
        np.testing.assert_allclose(codes.min(0), -codes.max(0), rtol=1e-4)


def test_products_are_those_of_integers_with_the_scale_of_the_weights_alone():
    rng = np.random.default_rng(0)
    x = rng.normal(2, 5, (7, 8)).astype(np.float32)
    scale, center = channel_scales(Range(x.min(0), x.max(0)), 127, True)
    arrays = {"scale": jnp.asarray(scale), "center": jnp.asarray(center)}
    found = ChannelCodes()(arrays, jnp.asarray(x), Context(mode="decode"))
    assert isinstance(found, QuantizedActivation) and (found.scale == 1).all() and np.abs(found.codes).max() == 127
    w = qtensor(jnp.asarray(scale[:, None] * rng.normal(size=(8, 3)).astype(np.float32)), FormatSpec("int8"))
    total = np.asarray(found.codes, np.int32) @ np.asarray(w.unpacked(), np.int32)
    np.testing.assert_array_equal(matmul(found, w), total.astype(np.float32) * np.asarray(w.scale))
    assert np.abs(np.asarray(found.codes) * scale + center - x).max() <= scale.max() / 2 * 1.001
    mask = jnp.asarray(x > 0)
    chosen = ChannelCodes()(arrays, SparseActivation(jnp.asarray(x), mask), Context(mode="decode"))
    zeros = ChannelCodes()(arrays, jnp.zeros_like(x), Context(mode="decode"))
    np.testing.assert_array_equal(chosen.codes, np.where(mask, found.codes, zeros.codes))


def test_channels_that_calibration_never_saw_are_dropped():
    scale, center = channel_scales(Range(np.zeros(2, np.float32), np.array([0, 254], np.float32)), 127, False)
    np.testing.assert_array_equal((scale, center), [[0, 2], [0, 0]])
    w = qtensor(jnp.asarray(scale[:, None] * np.ones((2, 3), np.float32)), FormatSpec("int8"))
    found = ChannelCodes()({"scale": scale, "center": center}, jnp.array([[9.0, 20.0]]), Context(mode="decode"))
    np.testing.assert_allclose(matmul(found, w), 20, rtol=1e-6)


def test_every_map_with_a_bias_is_symmetrized_and_scales_of_tensors_lose_far_more():
    model, note = tuned()
    names = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    assert set(note["symmetrized"]) == {f"blocks.{layer}.{name}" for layer in range(2) for name in names}
    wanted = logits(biased_model(), TOKENS)
    whole = run_recipe([SpikeAware(np.inf)], biased_model(), work())
    errors = [np.abs(logits(one, TOKENS) - wanted).mean() for one in (model, whole)]
    assert errors[0] < 0.3 * errors[1]
    kernel = model.parameter("blocks.0.mlp.up.kernel")
    assert kernel.spec.multiplies_as_integers and kernel.dtype == jnp.float32


def test_maps_without_a_bias_are_scaled_alone():
    model = tiny.tiny_model(layers=2)
    using = work()
    changed = run_recipe([OutlierTune("int8:group=16", "int6", "blocks.*.mlp.down")], model, using)
    assert using.notes["0-outliertune"]["symmetrized"] == []
    assert changed.config.inputs == ("blocks.*.mlp.down=channel_codes:int6",)
    assert not np.asarray(changed.parameter("blocks.1.mlp.down.inputs.0.center")).any()


def test_the_folder_gives_the_same_bits(tmp_path):
    model, _ = tuned()
    model_folder.save(model, tmp_path / "out")
    again = model_folder.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.values, model.values)


def test_recipes_and_options_are_checked_by_name():
    assert recipe.get_recipe("int8:group=64/int6") == [OutlierTune("int8:group=64", "int6")]
    assert recipe.get_recipe("") == [OutlierTune()]
    for one, message in ((OutlierTune(inputs="fp8_e4m3"), "outliertune: inputs = 'fp8_e4m3'"),
                         (OutlierTune("int8:group=24"), "no multiple of 24")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check_recipe([one], biased_model().config)
