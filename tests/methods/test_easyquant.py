"""EasyQuant: the search over scales, the room of 16 bits, and a model whose every scale is static."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from configs.recipes import easyquant as recipe
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.compress.scaling import logits
from sparsejax.io import model_folder
from sparsejax.methods.quant.easyquant import EasyQuant, best_scales, factors_of, products_in_16_bits
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import QTensor
from tests.compress import tiny

tiny_model = functools.cache(functools.partial(tiny.tiny_model, layers=2))
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 32), np.int32)
SITES = "blocks.*.{attn.v,mlp.down}"
INT7, STEPS = FormatSpec("int7"), 8


def work(folder=None):
    return Work(Calibration(CalibrationSpec(sequences=4, length=32), TOKENS, ""), TIERS["quick"], folder)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    using = work(tmp_path_factory.mktemp("pieces"))
    return run_recipe([EasyQuant("int4", STEPS, SITES)], tiny_model(), using), using


def rounded(values, scale, most):
    return np.clip(np.round(values / scale), -most, most) * scale


def mean_cosine(wanted, given_):
    return np.mean((wanted * given_).sum(0) / np.linalg.norm(wanted, axis=0) / np.linalg.norm(given_, axis=0))


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_the_search_never_ends_below_the_scales_of_the_extremes_and_reports_true_cosines(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, (20, 8)).astype(np.float32)  # a heavy tail: clipping pays
    w = rng.standard_normal((8, 5)).astype(np.float32)
    found = best_scales(x @ w, x, w, np.abs(x).max(), factors_of(STEPS), FormatSpec("int4"))
    before = mean_cosine(x @ w, rounded(x, np.abs(x).max() / 7, 7) @ rounded(w, np.abs(w).max(0) / 7, 7))
    after = mean_cosine(x @ w, rounded(x, np.asarray(found.inputs), 7) @ rounded(w, np.asarray(found.weights), 7))
    assert found.after >= found.before - 1e-6
    np.testing.assert_allclose([found.before, found.after], [before, after], atol=5e-3)  # halves may round to either side


def test_the_scales_of_the_extremes_are_in_the_grid_and_its_ends_are_half_and_twice():
    factors = factors_of(100)
    assert factors[0] == 1 and len(factors) == 101 and (factors.min(), factors.max()) == (0.5, 2)
    x, w = np.eye(4, dtype=np.float32), np.diag(np.array([1, 2, 4, 7], np.float32))  # nothing is lost at the extremes
    found = best_scales(x @ w, x, w, jnp.asarray(1.0), factors_of(STEPS), INT7)
    np.testing.assert_allclose(found.before, 1, atol=1e-6)
    np.testing.assert_allclose(found.inputs, 1 / 63, rtol=1e-6)
    np.testing.assert_allclose(found.weights[0], np.array([1, 2, 4, 7]) / 63, rtol=1e-6)


def test_eight_products_of_7_bits_fit_16_and_two_of_8():
    assert products_in_16_bits(INT7) == 8 and products_in_16_bits(FormatSpec("int8")) == 2
    assert 8 * 63**2 <= 2**15 - 1 < 9 * 63**2 and 2 * 127**2 <= 2**15 - 1 < 3 * 127**2


@given(arrays(np.int16, (2, 24), elements=st.sampled_from([-63, -62, -1, 0, 1, 62, 63])))
def test_sums_of_eight_products_in_16_bits_are_those_in_32(codes):
    narrow = (codes[0] * codes[1]).reshape(-1, 8).sum(1, dtype=np.int16).astype(np.int32)
    wide = codes.astype(np.int32)
    np.testing.assert_array_equal(narrow.sum(), (wide[0] * wide[1]).sum())


def test_every_map_gains_and_nothing_of_a_tensor_is_computed_at_run_time(fitted):
    model, using = fitted
    note = using.notes["0-easyquant"]
    assert set(note["cosines"]) == {f"blocks.{i}.{name}" for i in range(2) for name in ("attn.v", "mlp.down")}
    assert all(0.8 < before <= after <= 1 for before, after in note["cosines"].values())
    assert sum(before < after for before, after in note["cosines"].values()) >= 3
    assert set(model.config.inputs) == {f"blocks.*.{name}=calibrated:int4:tensor,static" for name in ("attn.v", "mlp.down")}
    kernel = model.parameter("blocks.1.mlp.down.kernel")
    assert isinstance(kernel, QTensor) and model.parameter("blocks.1.mlp.down.inputs.0.scale").shape == (1,)


def test_the_folder_gives_the_same_bits_and_an_interrupted_search_goes_on(fitted, tmp_path):
    model, using = fitted
    model_folder.save(model, tmp_path / "out")
    again = model_folder.load(tmp_path / "out")
    np.testing.assert_array_equal(logits(again, TOKENS[:1]), logits(model, TOKENS[:1]))
    (using.folder / "0-block1.npz").unlink()
    resumed = run_recipe([EasyQuant("int4", STEPS, SITES)], tiny_model(), work(using.folder))
    jax.tree.map(np.testing.assert_array_equal, resumed.values, model.values)


def test_recipes_and_options_are_checked_by_name():
    assert recipe.get_recipe("int7/40") == [EasyQuant("int7", 40)] and recipe.get_recipe("") == [EasyQuant()]
    with pytest.raises(ConfigError, match="easyquant: steps = 'x'"):
        recipe.get_recipe("int8/x")
    for one in (EasyQuant("int8:asym"), EasyQuant("ternary"), EasyQuant("int8:group=16"), EasyQuant("fp8_e4m3")):
        with pytest.raises(ConfigError, match="easyquant: format = .*symmetric integers by channel"):
            check_recipe([one], tiny_model().config)
    with pytest.raises(ConfigError, match="easyquant: steps = 0"):
        check_recipe([EasyQuant("int8", 0)], tiny_model().config)
