"""Static scales of activations, and int8 everywhere but where inputs spike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.recipes import spikes as recipe
from sparsejax.arrays import QuantizedActivation, SparseActivation, dense, matmul
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.compress.scaling import logits
from sparsejax.compress.statistics import channel_ranges
from sparsejax.compress.surgery import sites_of
from sparsejax.context import Context
from sparsejax.io import model_folder
from sparsejax.methods.quant.spikes import SpikeAware, over_median
from sparsejax.methods.quant.static_inputs import Calibrated, calibrated
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import qtensor
from tests.compress import tiny

TOKENS = np.random.default_rng(0).integers(0, 256, (4, 32), np.int32)
SPIKE = "blocks.1.mlp.down"


def work(folder=None, skip=0):
    return Work(Calibration(CalibrationSpec(sequences=4, length=32, skip_first=skip), TOKENS, ""), TIERS["quick"], folder)


@functools.cache
def spiking_model():
    """A hidden channel of the last block a thousand times as large; `down` makes up for it, so that nothing else changes."""
    model = tiny.tiny_model(layers=2)
    up, down = (model.parameter(f"blocks.1.mlp.{name}.kernel") for name in ("up", "down"))
    arrays = {"blocks.1.mlp.up.kernel": up.at[:, 7].multiply(1000), f"{SPIKE}.kernel": down.at[7].divide(1000)}
    return model.rebuilt(model.config, arrays)


@functools.cache
def compressed(ratio, spiking="float"):
    using = work()
    return run_recipe([SpikeAware(ratio, spiking)], spiking_model(), using), using.notes["0-spikeaware"]


def test_integers_of_one_scale_stay_integers_and_are_clipped_at_what_calibration_saw():
    x = jnp.asarray([[0.5, -2.0, 0.0, 9.0], [0.01, 1.0, 2.0, -2.0]])
    placed = calibrated(FormatSpec.parse("int8:tensor,static"), np.array([0.5, 2.0, 1.0, 2.0]))
    op = Calibrated(placed.op.removeprefix("calibrated:"))
    found = op(placed.arrays, x, Context(mode="decode"))
    assert isinstance(found, QuantizedActivation) and found.surrogate is None
    np.testing.assert_array_equal(found.codes, [[32, -127, 0, 127], [1, 64, 127, -127]])
    np.testing.assert_allclose(found.scale, 2 / 127)
    w = qtensor(jax.random.normal(jax.random.key(0), (4, 3)), FormatSpec("int8"))
    np.testing.assert_allclose(matmul(found, w), dense(found) @ dense(w), rtol=1e-5)
    chosen = SparseActivation(x, jnp.asarray(x > 0))
    np.testing.assert_array_equal(op(placed.arrays, chosen, Context(mode="decode")).dense(), np.where(x > 0, dense(found), 0))
    np.testing.assert_array_equal(dense(op({"scale": jnp.zeros(1)}, x, Context(mode="decode"))), np.zeros_like(x))


def test_other_formats_are_rounded_floats_and_scales_may_be_by_channel():
    x = jnp.asarray([[0.5, -2.0, 100.0], [0.01, 1.0, 448.0]])
    for text, points in (("fp8_e4m3:tensor,static", 448), ("int6:channel,static", 31)):
        spec = FormatSpec.parse(text)
        magnitude = np.abs(x).max(0)
        placed = calibrated(spec, magnitude)
        scale = magnitude / points if spec.granularity == "channel" else np.array([1.0])
        np.testing.assert_allclose(placed.arrays["scale"], scale, rtol=1e-6)
        found = Calibrated(text)(placed.arrays, x, Context(mode="decode"))
        assert found.dtype == x.dtype and abs(found - x).max() <= (scale * (16 if points == 448 else 0.51)).max()


def test_gradients_of_training_go_straight_through():
    arrays, x = {"scale": jnp.full(1, 0.1)}, jnp.linspace(-1, 1, 8).reshape(2, 4)
    w = jax.random.normal(jax.random.key(0), (4, 3))
    op = Calibrated("int8:tensor,static")
    gradient = jax.grad(lambda x: jnp.sum(matmul(op(arrays, x, Context(mode="train")), w)))(x)
    np.testing.assert_allclose(gradient, jnp.broadcast_to(w.sum(-1), x.shape), rtol=1e-5)


@pytest.mark.parametrize("text", ["int8:tensor", "int8:token,static", "int8:tensor,asym,static", "int8:group=4,static"])
def test_formats_without_one_calibrated_scale_are_refused(text):
    with pytest.raises(ConfigError, match="calibrated: format = .*int8:tensor,static"):
        Calibrated(text)


def test_ranges_are_those_of_the_tensors_without_the_tokens_that_are_skipped(tmp_path):
    model = tiny.tiny_model(layers=2)
    blocks = Blocks(model)
    sites = ["blocks.0.attn.v", "blocks.0.attn.q", SPIKE]
    found = channel_ranges(blocks, work(tmp_path, skip=3), sites)
    h, first = blocks.tensors(0, blocks.embed(TOKENS), "attn.q")
    tensors = dict(zip(sites, [first["attn.q"]] * 2 + [blocks.tensors(1, h, "mlp.down")[1]["mlp.down"]], strict=True))
    for site, x in tensors.items():
        rows = np.asarray(x)[:, 3:].reshape(-1, x.shape[-1])
        np.testing.assert_allclose(found[site].low, rows.min(0), rtol=1e-5)
        np.testing.assert_allclose(found[site].high, rows.max(0), rtol=1e-5)
        np.testing.assert_allclose(found[site].magnitude, np.abs(rows).max(0), rtol=1e-5)
    again = channel_ranges(blocks, work(tmp_path, skip=3), sites)
    np.testing.assert_array_equal(again[SPIKE].high, found[SPIKE].high)


def test_a_peak_is_judged_by_the_median_of_its_kind():
    peaks = {"blocks.0.mlp.down": 3.0, "blocks.1.mlp.down": 300.0, "blocks.0.attn.o": 7.0, "blocks.1.attn.o": 0.0}
    ratios = over_median(peaks)
    assert ratios["blocks.0.mlp.down"] == 1 and ratios["blocks.1.mlp.down"] == 100
    assert ratios["blocks.1.attn.o"] == 0 and 1e20 < ratios["blocks.0.attn.o"] < np.inf  # reports hold finite numbers


def test_an_injected_spike_selects_exactly_its_map_and_leaves_it_float():
    model, note = compressed(10.0)
    assert list(note["spiking"]) == [SPIKE] and note["spiking"][SPIKE] > 100
    ops = {site: model.parameter(f"{site}.kernel") for site in sites_of(model.config, "weights", "blocks.*.{attn,mlp}.*")}
    assert [site for site, kernel in ops.items() if isinstance(kernel, jax.Array)] == [SPIKE]
    assert not any(rule.startswith((SPIKE, "blocks.*.mlp.down")) for rule in model.config.inputs)
    down, others = 64 * 32, 2 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 32 * 64) + 64 * 32
    assert note["activation_bits"] == pytest.approx((8 * others + 32 * down) / (others + down))


def test_leaving_the_spike_in_higher_precision_saves_most_of_the_error():
    wanted = logits(spiking_model(), TOKENS[:2])
    errors = {key: np.abs(logits(compressed(*key)[0], TOKENS[:2]) - wanted).mean()
              for key in ((np.inf, "float"), (10.0, "fp8_e4m3"), (10.0, "float"))}  # fmt: skip
    everywhere, eight_bits, kept = errors.values()
    assert kept <= eight_bits and eight_bits < 0.5 * everywhere


def test_the_folder_holds_the_scales_and_gives_the_same_bits(tmp_path):
    model = compressed(10.0, "fp8_e4m3")[0]
    model_folder.save(model, tmp_path / "out")
    again = model_folder.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.values, model.values)
    np.testing.assert_array_equal(logits(again, TOKENS[:2]), logits(model, TOKENS[:2]))


def test_options_are_checked_by_name():
    assert recipe.get_recipe("inf/float") == [SpikeAware(np.inf, "float")] and recipe.get_recipe("") == [SpikeAware()]
    with pytest.raises(ConfigError, match="spikes: ratio = 'x'"):
        recipe.get_recipe("x")
    for one, message in ((SpikeAware(0.5), "ratio = 0.5: must be at least 1"), (SpikeAware(2, "fp16"), "spiking = 'fp16'")):
        with pytest.raises(ConfigError, match=message):
            check_recipe([one], spiking_model().config)
