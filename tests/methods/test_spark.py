"""Spark's feed-forward network: its equation, its parameter count, its density, and that unpredicted units are not computed."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import nnx_compat
from sparsejax.arrays import dense
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.context import Context
from sparsejax.data.config import DataConfig
from sparsejax.layers.op import SiteRules
from sparsejax.methods.sparsity.spark import Spark
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.models.sizes import linear_shapes, parameter_counts
from sparsejax.models.transformer import Transformer
from sparsejax.ops.selectors import stat_topk
from sparsejax.plugs import ConfigError

CTX = Context(mode="prefill")


def config(feed="spark:0.25", **fields) -> ModelConfig:
    own = dict(num_layers=2, d_model=16, vocab_size=40, attention=AttentionConfig(num_heads=2),
               ffn=FFNConfig(hidden=64, activation="gelu"), feed_pattern=(feed,))
    data = DataConfig(source="copy", sequence_length=8)
    return finalize(ExperimentConfig(model=ModelConfig(**{**own, **fields}), data=data)).model


def built(spec, **fields):
    return spec.build(config(**fields), key=jax.random.key(0), site="mlp", rules=SiteRules())


def test_it_is_its_equation_in_float64():
    module = built(Spark(0.25, 0.3))
    x = jax.random.normal(jax.random.key(1), (2, 3, 16))
    k1, k2, v = (np.asarray(linear.kernel.get_value(), np.float64) for linear in (module.gate, module.up, module.down))
    wide = np.asarray(x, np.float64)
    scores = wide[..., :5] @ k1
    theta = scores.mean(-1, keepdims=True) + scores.std(-1, keepdims=True) * NormalDist().inv_cdf(0.75)
    passed = np.maximum(scores - theta, 0)
    phi = np.vectorize(NormalDist().cdf)(passed)
    np.testing.assert_allclose(module(x, CTX)[0], (passed * phi * (wide[..., 5:] @ k2)) @ v, rtol=2e-4, atol=1e-5)


def test_the_predictor_costs_no_parameters():
    plain, spark = parameter_counts(config("ffn")), parameter_counts(config("spark:0.08,split=0.5"))
    assert plain == spark
    assert linear_shapes(config())["blocks.1.mlp.gate"] == (4, 64) and linear_shapes(config())["blocks.1.mlp.up"] == (12, 64)


def test_units_that_the_predictor_leaves_out_touch_neither_up_nor_down():
    module = built(Spark(0.1))
    x = jax.random.normal(jax.random.key(1), (1, 1, 16))
    mask = np.asarray(module.passed(module.gate(x[..., :4], CTX), CTX).mask)[0, 0]
    assert 0 < mask.sum() < 24
    before = module(x, CTX)[0]
    for linear, axis in ((module.up, 1), (module.down, 0)):
        kernel = np.array(linear.kernel.get_value())
        np.moveaxis(kernel, axis, 0)[~mask] = 1e3
        linear.kernel = nnx_compat.weight(jnp.asarray(kernel), linear.kernel.axes, "matrix")
    np.testing.assert_array_equal(module(x, CTX)[0], before)


def test_on_a_gaussian_row_the_density_and_the_mean_are_the_cards():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 4096)), jnp.float32)
    values = stat_topk(x, 0.92, through_statistics=True)
    assert float(jnp.mean(values > 0)) == pytest.approx(0.08, abs=0.01)
    q = NormalDist().inv_cdf(0.92)
    assert float(jnp.mean(values)) == pytest.approx(NormalDist().pdf(q) - q * 0.08, rel=0.03)
    np.testing.assert_array_equal(stat_topk(3 * x[:2] + 1, 0.92, through_statistics=True) > 1e-4, values[:2] > 1e-4 / 3)


def test_fraction_one_passes_every_unit_as_it_is_and_tokens_out_of_scope_are_dense():
    x = jax.random.normal(jax.random.key(1), (1, 2, 16))
    scores = jax.random.normal(jax.random.key(2), (1, 2, 64))
    assert built(Spark(1.0)).passed(scores, CTX).mask.all()
    np.testing.assert_array_equal(dense(built(Spark(1.0)).passed(scores, CTX)), scores)
    half = CTX._replace(sparsify=jnp.array([[False, True]]))
    mixed, whole, sparse = (built(Spark(f))(x, c)[0] for f, c in ((0.1, half), (1.0, CTX), (0.1, CTX)))
    np.testing.assert_allclose(mixed[0, 0], whole[0, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mixed[0, 1], sparse[0, 1], rtol=1e-5, atol=1e-6)


def test_a_model_of_spark_layers_trains_and_counts_its_zeros():
    cfg = config("spark:0.1")
    structure, values = nnx_compat.split(Transformer(cfg, jax.random.key(0)))
    batch = {"tokens": jnp.arange(16, dtype=jnp.int32).reshape(2, 8)}

    def loss(v):
        return jnp.mean(jnp.square(nnx_compat.merge(structure, v)(batch, CTX)[0]))

    gradients = jax.jit(jax.grad(loss))(values)["blocks"]["segments"]["0"]["0"]["mlp"]
    assert all(float(jnp.abs(gradients[name]["kernel"]).max()) > 0 for name in ("gate", "up", "down"))


@pytest.mark.parametrize("fields, message", [
    (dict(feed="spark:0"), "fraction"),
    (dict(feed="spark:0.1,1.0"), "split"),
    (dict(ffn=FFNConfig(hidden=64, activation="swiglu")), "needs one of a single tensor"),
])  # fmt: skip
def test_what_makes_no_spark_layer_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        linear_shapes(config(**fields))
