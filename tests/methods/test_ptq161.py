"""PTQ1.61: planes of bits, the scales that signs start with, and their learning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.recipes import ptq161 as recipe
from sparsejax.compress import accounting
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.compress.scaling import logits
from sparsejax.context import Context
from sparsejax.io import model_folder
from sparsejax.methods.quant.ptq161 import Ptq161, SalientPlanes, block_loss, planes, rounded, salient_inputs, start_of
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import QTensor
from tests.compress import tiny

TOKENS = np.random.default_rng(0).integers(0, 256, (4, 32), np.int32)
DOWN, COUNT = "blocks.1.mlp.down", 13  # of 64 inputs
ONE = Ptq161(0.2, 6, "blocks.*.mlp.down")


def work(folder=None):
    return Work(Calibration(CalibrationSpec(sequences=4, length=32), TOKENS, ""), TIERS["quick"], folder)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    using = work(tmp_path_factory.mktemp("pieces"))
    return run_recipe([ONE], tiny.tiny_model(layers=2), using), using


def drawn(seed, inputs=9, outputs=5):
    return np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)


def affine(w, bits=4):
    """Round to nearest in numpy, the range of an output with 0 in it."""
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    s = (high - low) / (2**bits - 1)
    z = np.round(-low / s)
    return (np.clip(np.round(w / s) + z, 0, 2**bits - 1) - z) * s


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_planes_hold_what_the_equations_say_for_any_scales(seed):
    rng, w = np.random.default_rng(seed), drawn(seed)
    rows = np.sort(rng.choice(9, 3, replace=False))
    fixed, params = start_of(w, rows)
    params = {name: value * jnp.asarray(rng.uniform(0.5, 1.5, value.shape), jnp.float32) for name, value in params.items()}
    plane, arrays = planes(fixed, params, "float32")
    found = SalientPlanes(3)(arrays, plane, Context())
    others = np.setdiff1d(np.arange(9), rows)
    alpha, r1, r2 = (np.asarray(params[name]) for name in ("alpha", "r1", "r2"))
    mean = w[others].mean(0)
    wanted = affine(w)
    wanted[others] = (np.sign(w[others] - mean) * alpha + mean) * r1 * r2[others, None]
    np.testing.assert_allclose(rounded(fixed, params), wanted, atol=2e-6)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    x = rng.standard_normal((4, 9)).astype(np.float32)  # the product cut in two
    signs = np.where(w >= mean, 1, -1)[others] * (alpha * r1)
    two = x[:, rows] @ wanted[rows] + (x * r2)[:, others] @ signs + (x * r2)[:, others].sum(1, keepdims=True) * (mean * r1)
    np.testing.assert_allclose(x @ np.asarray(found), two, atol=2e-5)


@given(st.integers(0, 10**6), st.floats(0.5, 1.5))
def test_no_other_scale_of_the_signs_has_less_error(seed, factor):
    w = drawn(seed)
    fixed, params = start_of(w, np.array([2, 7]))
    others = np.asarray(fixed["others"]) > 0

    def error(alpha):
        rest = w - np.asarray(fixed["mean"]) - alpha * np.asarray(fixed["signs"])
        return np.square(rest[others]).sum(0)

    assert (error(np.asarray(params["alpha"])) <= error(factor * np.asarray(params["alpha"])) + 1e-6).all()


def test_with_all_inputs_salient_it_is_rounding_to_4_bits():
    w = drawn(0)
    fixed, params = start_of(w, np.arange(9))
    plane, arrays = planes(fixed, params, "float32")
    np.testing.assert_allclose(SalientPlanes(9)(arrays, plane, Context()), affine(w), atol=2e-6)
    assert not np.asarray(arrays["factor"]).any()


def test_salient_are_the_inputs_of_largest_magnitude():
    magnitude = np.array([1.0, 9, 3, 9, 0, 2])
    np.testing.assert_array_equal(salient_inputs(magnitude, 0.5), [1, 2, 3])
    np.testing.assert_array_equal(salient_inputs(magnitude, 0.01), [1])
    np.testing.assert_array_equal(salient_inputs(magnitude, 1.0), np.arange(6))


def test_the_loss_of_a_block_counts_size_and_direction_of_both_targets():
    x = jax.random.normal(jax.random.key(0), (1, 3, 4))
    assert block_loss(x, (x, x)) == pytest.approx(0, abs=1e-6)
    assert block_loss(2 * x, (x,)) == pytest.approx(float(jnp.mean(x**2)), rel=1e-5)  # the same direction
    turned = jnp.stack([x[..., 1], -x[..., 0], x[..., 3], -x[..., 2]], -1)  # at right angles
    assert block_loss(turned, (x,)) > 10 and np.isfinite(block_loss(-x, (x, x)))


def test_learning_lowers_the_loss_of_every_block_and_signs_stay(fitted):
    model, using = fitted
    losses = using.notes["0-ptq161"]["block_losses"]
    assert len(losses["start"]) == 2 and all(b < a for a, b in zip(losses["start"], losses["learned"], strict=True))
    w = np.asarray(tiny.tiny_model(layers=2).parameter(f"{DOWN}.kernel"))
    factor = np.asarray(model.parameter(f"{DOWN}.weights.0.factor"))
    others = np.flatnonzero(factor)
    assert len(others) == 64 - COUNT and (factor[others] != 1).any()
    signs = np.sign(np.asarray(model.parameter(f"{DOWN}.kernel").dequantize()))[others]
    np.testing.assert_array_equal(signs, np.where(w[others] >= w[others].mean(0), 1, -1))


def test_every_bit_is_counted_and_the_folder_gives_the_same_bits(fitted, tmp_path):
    model, using = fitted
    note = using.notes["0-ptq161"]
    vectors = 4 * (32 + 2 * 32 + 32 + 64)  # alpha r1; scale and zero of the codes; mu r1; r2
    assert note["bytes"] == 2 * (64 * 32 // 8 + COUNT * 32 * 3 // 8 + vectors)
    assert note["bits_per_weight"] == pytest.approx(1 + 3 * COUNT / 64 + 8 * vectors / (64 * 32))
    saved = accounting.bytes_per_token(tiny.tiny_model(layers=2)).total - accounting.bytes_per_token(model).total
    assert saved == note["bytes_before"] - note["bytes"]
    model_folder.save(model, tmp_path / "out")
    again = model_folder.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.values, model.values)
    np.testing.assert_array_equal(logits(again, TOKENS[:1]), logits(model, TOKENS[:1]))
    assert isinstance(again.parameter(f"{DOWN}.weights.0.low"), QTensor)


def test_what_was_interrupted_goes_on_at_its_block_to_the_same_bits(fitted):
    model, using = fitted
    (using.folder / "0-block1.npz").unlink()
    again = run_recipe([ONE], tiny.tiny_model(layers=2), work(using.folder))
    jax.tree.map(np.testing.assert_array_equal, again.values, model.values)


def test_recipes_and_options_are_checked_by_name():
    assert recipe.get_recipe("") == [Ptq161()] and recipe.get_recipe("0.4/5") == [Ptq161(0.4, 5)]
    with pytest.raises(ConfigError, match="ptq161: 'x': expected SALIENT/EPOCHS"):
        recipe.get_recipe("x")
    for one, message in ((Ptq161(0.0), r"salient = 0.0: must be in \(0, 1\]"), (Ptq161(epochs=0), "epochs = 0")):
        with pytest.raises(ConfigError, match=message):
            check_recipe([one], tiny.tiny_model(layers=2).config)
    with pytest.raises(ConfigError, match="salient_planes: kernel = .*: expected planes of bits"):
        SalientPlanes(1)({"low": jnp.zeros((1, 3)), "factor": jnp.zeros(2), "mean": jnp.zeros(3)}, jnp.ones((2, 3)), Context())
    with pytest.raises(ConfigError, match="count = 40: is above the 32 inputs"):
        tiny.tiny_model(layers=2).with_rules(weights=("blocks.*.attn.q=salient_planes:40",))
