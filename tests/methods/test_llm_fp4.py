"""LLM-FP4: its grids, the arithmetic of exponent biases, and the search over formats and ranges."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.recipes import llm_fp4 as recipe
from sparsejax.arrays import SparseActivation
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.compress.scaling import logits
from sparsejax.context import Context
from sparsejax.io import model_folder
from sparsejax.methods.quant.llm_fp4 import ExponentShift, LlmFp4, exponent_offsets, factors_of, search
from sparsejax.ops.formats.grids import grid_of
from sparsejax.ops.formats.quantize import fake
from sparsejax.ops.formats.scales import QParams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import QTensor
from tests.compress import tiny

TOKENS = np.random.default_rng(0).integers(0, 256, (4, 32), np.int32)
GRIDS = {
    "fp4_e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "fp4_e1m2": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
    "fp4_e3m0": [0, 0.25, 0.5, 1, 2, 4, 8, 16],
}
BIAS = {"fp4_e2m1": (2, 1, 1), "fp4_e1m2": (1, 2, 0), "fp4_e3m0": (3, 0, 3)}  # E, M, b
STEPS = 6


def work(folder=None):
    return Work(Calibration(CalibrationSpec(sequences=4, length=32), TOKENS, ""), TIERS["quick"], folder)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    using = work(tmp_path_factory.mktemp("pieces"))
    one = LlmFp4(steps=STEPS, sites="blocks.*.mlp.down")
    return one, run_recipe([one], tiny.tiny_model(layers=2), using), using


def of_the_paper(x, e, m, b):
    """Float64; the exponent by frexp, since a logarithm may be off at powers of two."""
    most = (2 - 2.0**-m) * 2.0 ** (2**e - 1 - b)
    limited = np.clip(x, -most, most)
    exponent = np.frexp(np.abs(limited) * 2.0**b)[1] - 1.0  # floor(log2|x| + b)
    step = 2.0 ** (np.where(limited == 0, 1, np.maximum(exponent, 1)) - m - b)
    return np.round(limited / step) * step


@pytest.mark.parametrize("element", GRIDS)
def test_the_grids_of_the_card_and_their_codes(element):
    codes = jnp.arange(16, dtype=jnp.uint8)
    values = np.asarray(grid_of(element, "narrow").decode(codes))
    np.testing.assert_array_equal(values, GRIDS[element] + [-value for value in GRIDS[element]])
    again = np.asarray(grid_of(element, "narrow").encode(jnp.asarray(values), "even", None))
    np.testing.assert_array_equal(again & 7, np.asarray(codes) & 7)


@pytest.mark.parametrize("element", GRIDS)
@given(st.integers(0, 10**6), st.floats(-3, 6))
@settings(max_examples=20, deadline=None)
def test_a_real_exponent_bias_is_a_scale_and_rounding_twice_is_rounding_once(element, seed, b):
    x = np.random.default_rng(seed).standard_t(2, (4, 6)).astype(np.float32)
    e, m, own = BIAS[element]
    scale = np.float32(2.0 ** (own - b))
    spec, parameters = FormatSpec(element, "tensor", static=True), QParams(jnp.full((1, 1), scale))
    found = fake(jnp.asarray(x), spec, parameters=parameters)
    exact = of_the_paper((x / scale).astype(np.float64), e, m, own) * scale
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    np.testing.assert_allclose(found, of_the_paper(x.astype(np.float64), e, m, own - np.log2(np.float64(scale))), rtol=1e-5)
    np.testing.assert_array_equal(fake(found, spec, parameters=parameters), found)


@given(st.integers(0, 10**6), st.sampled_from(sorted(GRIDS)))
def test_offsets_are_integers_of_the_exponent_and_their_powers_change_no_bit(seed, element):
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 8), (8, 3)))
    x *= np.exp2(rng.integers(-9, 9, 8)).astype(np.float32)
    offsets = exponent_offsets(np.abs(x).max(0), element)
    assert offsets.min() == 0 and offsets.max() <= 2 ** BIAS[element][0] - 1
    factor = np.exp2(offsets).astype(np.float32)
    np.testing.assert_array_equal(((x * factor)[:, :, None] * (w / factor[:, None])[None]), x[:, :, None] * w[None])
    moved = np.abs(x * factor).max(0)
    reached = offsets < 2 ** BIAS[element][0] - 1  # the others would go further
    assert (moved[reached] >= moved.max() / 4).all()


def test_channels_without_anything_and_inputs_without_anything_have_offsets():
    np.testing.assert_array_equal(exponent_offsets(np.array([4.0, 0.0, 1.0]), "fp4_e2m1"), [0, 3, 2])
    np.testing.assert_array_equal(exponent_offsets(np.zeros(2), "fp4_e2m1"), [3, 3])


def test_the_shift_is_exact_in_half_precision_and_keeps_zeros():
    x = jax.random.normal(jax.random.key(0), (3, 4), jnp.bfloat16)
    factor = {"factor": jnp.array([1.0, 2, 8, 4])}
    moved = ExponentShift()(factor, SparseActivation(x, x > 0), Context()).dense()
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved.astype(np.float32), np.where(x > 0, x, 0).astype(np.float32) * factor["factor"][None])


def drawn(seed=0, spread=0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((32, 8)) * np.exp2(spread * rng.standard_normal(8))
    return x.astype(np.float32), rng.standard_normal((8, 6)).astype(np.float32)


@given(st.integers(0, 10**6), st.sampled_from([4, 16]))
@settings(max_examples=5, deadline=None)
def test_the_search_never_ends_above_its_start_and_tells_the_true_error(seed, input_bits):
    x, w = drawn(seed, 2.0)
    assert factors_of(STEPS)[0] == 1 and len(factors_of(STEPS)) == STEPS + 1
    found = search(x, w, np.abs(x).max(0), input_bits=input_bits, steps=STEPS)
    assert found.after <= found.before * (1 + 1e-6)
    factor = np.exp2(found.offsets).astype(np.float32)
    held = np.asarray(fake(jnp.asarray(w / factor[:, None]), FormatSpec(found.weights), parameters=QParams(found.weight_scale)))
    entering = jnp.asarray(x * factor)
    if found.inputs:
        spec = FormatSpec(found.inputs, "tensor", static=True)
        entering = fake(entering, spec, parameters=QParams(found.input_scale.reshape(1, 1)))
    error = np.square(np.asarray(entering) @ held - x @ w).sum() / np.square(x @ w).sum()
    assert found.after == pytest.approx(error, rel=1e-3)


def test_biases_by_channel_are_far_better_where_channels_differ():
    shifted, plain = [], []
    for seed in range(4):
        x, w = drawn(seed, 2.0)
        w /= np.abs(x).max(0)[:, None]  # every channel counts
        shifted.append(search(x, w, np.abs(x).max(0), steps=STEPS).after)
        plain.append(search(x, w, np.abs(x).max(0), steps=STEPS, shift=False).after)
    assert np.mean(shifted) < 0.7 * np.mean(plain)


def test_a_model_holds_formats_scales_and_shifts_and_its_folder_gives_the_same_bits(rounded, tmp_path):
    _, model, using = rounded
    note = using.notes["0-llmfp4"]
    for site, (before, after) in note["errors"].items():
        kernel, factor = model.parameter(f"{site}.kernel"), np.asarray(model.parameter(f"{site}.inputs.0.factor"))
        assert 0 < after <= before and isinstance(kernel, QTensor) and str(kernel.spec) == note["format_of"][site]
        assert note["inputs"][site] in GRIDS and (np.log2(factor) % 1 == 0).all() and factor.max() > 1
        assert model.parameter(f"{site}.inputs.1.scale").shape == (1,)
    assert note["bits_per_weight"] == pytest.approx(4 + 32 / 64)
    model_folder.save(model, tmp_path / "out")
    again = model_folder.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.values, model.values)
    assert np.isfinite(logits(again, TOKENS[:1])).all()


def test_what_was_interrupted_goes_on_at_its_block_to_the_same_bits(rounded):
    one, model, using = rounded
    (using.folder / "0-block1.npz").unlink()
    again = run_recipe([one], tiny.tiny_model(layers=2), work(using.folder))
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.values, model.values)


def test_recipes_and_options_are_checked_by_name():
    assert recipe.get_recipe("") == [LlmFp4()] and recipe.get_recipe("6/16/plain") == [LlmFp4(6, 16, False)]
    with pytest.raises(ConfigError, match="llm_fp4: '4/x': expected bits as WEIGHTS/INPUTS"):
        recipe.get_recipe("4/x")
    for one, message in ((LlmFp4(5), "llm_fp4: bits = 5: allowed are 4, 6, 8"), (LlmFp4(4, 3), "input_bits = 3"),
                         (LlmFp4(steps=0), "steps = 0")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check_recipe([one], tiny.tiny_model(layers=2).config)
