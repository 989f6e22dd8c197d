"""LLM.int8: the decomposition is the product, its ends are the float and the plain int8 product, the pass finds outliers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.recipes import llm_int8 as recipe
from configs.recipes import smoothquant as plain_recipe
from sparsejax.arrays import LowRank, OutlierActivation, SparseActivation, Sum, dense, kind, matmul
from sparsejax.compress.recipe import check_recipe, run_recipe
from sparsejax.compress.scaling import logits
from sparsejax.context import Context
from sparsejax.io import model_folder
from sparsejax.io.export_hf import write_hf
from sparsejax.io.load import load
from sparsejax.methods.quant.llm_int8 import LlmInt8, OutlierInt8
from sparsejax.methods.quant.qat import Int8Activation
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import qtensor
from tests.methods.test_smoothquant import TOKENS, outlier_model, work

RNG = np.random.default_rng(0)
OUTLYING = [2, 5, 11]
X = (RNG.standard_normal((3, 4, 12)) * np.where(np.isin(np.arange(12), OUTLYING), 40, 1)).astype(np.float32)
W = RNG.standard_normal((12, 7)).astype(np.float32)


def encoded(columns, x=X, mode="prefill"):
    """x with columns left as floats; numbers of 12 name none."""
    op = OutlierInt8(len(columns))
    return op({"columns": jnp.asarray(columns, jnp.int32)}, jnp.asarray(x), Context(mode=mode))


def weight(text):
    return qtensor(jnp.asarray(W), FormatSpec.parse(text))


WEIGHTS = {
    "float": lambda: jnp.asarray(W),
    "int8": lambda: weight("int8"),
    "int4 of one scale": lambda: weight("int4:tensor"),
    "int4 in groups": lambda: weight("int4:asym,group=4"),
    "with an adapter": lambda: Sum(weight("int8"), LowRank(jnp.asarray(W[:, :2]), jnp.asarray(W[:2]))),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_two_products_are_that_of_the_dequantized_operands(name):
    x, w = encoded([*OUTLYING, 12, 12]), WEIGHTS[name]()
    assert kind(x) == "OutlierActivation"
    np.testing.assert_allclose(matmul(x, w), np.asarray(dense(x)) @ np.asarray(dense(w)), rtol=1e-5, atol=2e-4)


def test_outliers_are_exact_and_the_rest_is_off_by_half_a_step_of_its_own_scale():
    x, w = encoded(OUTLYING), weight("int8")
    rest = np.where(np.isin(np.arange(12), OUTLYING), 0, X)
    steps = np.abs(rest).max(-1, keepdims=True) / 127
    np.testing.assert_allclose(x.values.scale, steps, rtol=1e-6)
    np.testing.assert_array_equal(dense(x)[..., OUTLYING], X[..., OUTLYING])
    others = np.delete(np.arange(12), OUTLYING)
    bound = 0.5 * steps * np.abs(dense(w))[others].sum(0)
    assert (np.abs(matmul(x, w) - X @ np.asarray(dense(w))) <= bound * 1.001 + 1e-4).all()
    assert x.values.scale.max() < 0.2 * Int8Activation()(jnp.asarray(X), Context(mode="prefill")).scale.max()


def test_all_columns_give_the_float_product_and_none_the_plain_product_of_integers():
    w = weight("int8")
    np.testing.assert_allclose(matmul(encoded(range(12)), w), X @ np.asarray(dense(w)), rtol=1e-5, atol=1e-4)
    plain = Int8Activation()(jnp.asarray(X), Context(mode="prefill"))
    np.testing.assert_array_equal(matmul(encoded([12, 12]), w), matmul(plain, w))


def test_gradients_go_straight_through_the_integers():
    w, g = weight("int8"), RNG.standard_normal((3, 4, 7)).astype(np.float32)
    found = jax.grad(lambda x: jnp.sum(matmul(encoded(OUTLYING, x, "train"), w) * g))(jnp.asarray(X))
    np.testing.assert_allclose(found, g @ np.asarray(dense(w)).T, rtol=1e-5, atol=1e-5)


def test_entries_that_a_selector_dropped_stay_zeros():
    mask = RNG.random(X.shape) < 0.5
    op = OutlierInt8(3)
    x = op({"columns": jnp.asarray(OUTLYING)}, SparseActivation(jnp.asarray(X), jnp.asarray(mask)), Context(mode="prefill"))
    assert isinstance(x, OutlierActivation) and not np.asarray(dense(x))[~mask].any()


@pytest.fixture(scope="module")
def compressed():
    """(model, what the report says of it)."""
    using = work()
    return run_recipe(recipe.get_recipe("6.0"), outlier_model(), using), using.notes["1-llmint8"]


def test_the_pass_finds_the_outliers_and_reports_them(compressed):
    model, note = compressed
    counts = note["outliers_of"]
    for layer in range(2):
        for site in ("attn.q", "attn.v", "mlp.up"):
            assert counts[f"blocks.{layer}.{site}"] == 3
            found = np.asarray(model.parameter(f"blocks.{layer}.{site}.inputs.0.columns"))
            assert sorted(found[found < 32]) == [3, 11, 20]
    assert note["threshold"] == 6 and 0 < note["outlier_share"] < 0.2
    assert f"blocks.*.attn.q=outlier_int8:{max(counts['blocks.0.attn.q'], counts['blocks.1.attn.q'])}" in model.config.inputs


def test_it_loses_less_than_plain_integers_and_the_folder_gives_the_same_bits(compressed, tmp_path):
    model, _ = compressed
    exact = logits(outlier_model(), TOKENS)
    plain = run_recipe(plain_recipe.get_recipe("off"), outlier_model(), work())
    errors = [np.mean(np.square(logits(one, TOKENS) - exact)) for one in (model, plain)]
    assert errors[0] < 0.5 * errors[1], errors
    none = run_recipe(recipe.get_recipe("inf"), outlier_model(), work())
    assert none.config.inputs == plain.config.inputs
    model_folder.save(model, tmp_path / "out")
    np.testing.assert_array_equal(logits(model_folder.load(tmp_path / "out"), TOKENS), logits(model, TOKENS))


def test_a_published_folder_brings_its_outlying_channels_back(compressed, tmp_path):
    model, _ = compressed
    write_hf(model, tmp_path / "hf", store="compressed-tensors")
    again = load(str(tmp_path / "hf"))
    assert again.config.inputs == model.config.inputs
    name = "blocks.1.mlp.up.inputs.0.columns"
    found, wanted = (one.parameter(name) for one in (again, model))
    assert found.dtype == wanted.dtype == jnp.int32 and np.array_equal(found, wanted)


def test_what_makes_no_sense_is_refused():
    for argument, message in [("-1", "threshold = -1.0: must not be"), ("six", "threshold = 'six': expected a number")]:
        with pytest.raises(ConfigError, match=message):
            check_recipe(recipe.get_recipe(argument), outlier_model().config)
    with pytest.raises(ConfigError, match="sites = 'blocks.*.mlp.dwon'"):
        check_recipe([LlmInt8(sites="blocks.*.mlp.dwon")], outlier_model().config)
    with pytest.raises(ConfigError, match="columns = 40: the map has 32 inputs"):
        OutlierInt8(40).validate(32, "model.inputs[0]")
