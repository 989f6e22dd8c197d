"""Relufication's op, FATReLU after training, and Q-Sparse's top-k of inputs: the oracles of their cards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import nnx_compat
from sparsejax.arrays import dense, matmul
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, run_recipe
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.context import Context, Probe, Stat
from sparsejax.data.config import DataConfig
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.fatrelu import FatRelu
from sparsejax.methods.sparsity.relufication import Relu
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.models.transformer import Transformer
from sparsejax.plugs import ConfigError, resolve

CTX = Context(mode="prefill")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 8)), jnp.int32)


def model(activation="reglu", **fields) -> Model:
    own = dict(num_layers=2, d_model=16, vocab_size=40, attention=AttentionConfig(num_heads=2),
               ffn=FFNConfig(hidden=24, activation=activation))
    data = DataConfig(source="copy", sequence_length=8)
    config = finalize(ExperimentConfig(model=ModelConfig(**{**own, **fields}), data=data))
    structure, values = nnx_compat.split(Transformer(config.model, jax.random.key(1)))
    return Model("tiny", config.model, structure, values)


def outputs(m: Model, ctx=CTX):
    return jax.jit(lambda v: nnx_compat.merge(m.structure, v)({"tokens": TOKENS}, ctx))(m.values)


def zeros(m: Model) -> float:
    probe = Probe("mlp.hidden", lambda h, ctx: {"zeros": Stat(jnp.mean(h == 0))})
    return float(jnp.mean(outputs(m, CTX._replace(probes=(probe,)))[1]["mlp.hidden"]["zeros"].value))


@settings(max_examples=6, deadline=None)
@given(st.floats(-1, 1), st.integers(0, 99))
def test_the_op_is_relu_of_what_is_left_of_the_shift(shift, seed):
    x = np.random.default_rng(seed).standard_normal((2, 3, 5)).astype(np.float32)
    found = Relu(shift)(jnp.asarray(x), CTX)
    np.testing.assert_array_equal(dense(found), np.maximum(x - np.float32(shift), 0))
    np.testing.assert_array_equal(found.mask, x - np.float32(shift) > 0)


def test_an_input_that_is_positive_is_left_as_it_is_and_tokens_out_of_scope_too():
    x = jnp.abs(jax.random.normal(jax.random.key(0), (1, 2, 5)))
    np.testing.assert_array_equal(dense(Relu()(x, CTX)), x)
    scoped = Relu(0.1)(-x, CTX._replace(sparsify=jnp.array([[True, False]])))
    np.testing.assert_array_equal(dense(scoped), jnp.stack([0 * x[:, 0], -x[:, 1]], axis=1))


def test_both_stages_reach_every_map_by_config():
    inputs = ("blocks.*.attn.{q,k,v}=relu", "blocks.*.mlp.{gate,up}=relu:0.1")

    def measure(name):
        return Probe(name, lambda x, ctx: {"zeros": Stat(jnp.mean(dense(x) == 0))})

    stats = outputs(model(inputs=inputs), CTX._replace(probes=tuple(map(measure, ("attn.q", "mlp.gate", "mlp.down")))))[1]
    found = {site: float(jnp.mean(stats[site]["zeros"].value)) for site in ("attn.q", "mlp.gate", "mlp.down")}
    assert all(0.3 < value < 0.8 for value in found.values()), found


def test_fatrelu_raises_the_threshold_of_a_trained_model_and_never_loses_a_zero(tmp_path):
    base = model()
    calibration = Calibration(CalibrationSpec(), np.asarray(TOKENS), "")
    counted = []
    for threshold in (0.0, 0.01, 0.1, 1.0):
        shifted = run_recipe([FatRelu(threshold)], base, Work(calibration, TIERS["quick"]))
        assert shifted.config.ffn.activation == f"fatreglu:{threshold!r}"
        counted.append(zeros(shifted))
        if threshold == 0:
            np.testing.assert_array_equal(outputs(shifted)[0], outputs(base)[0])
    assert counted == sorted(counted) and counted[0] == zeros(base) and counted[-1] > counted[0] + 0.1


def test_fatrelu_refuses_what_was_not_trained_with_relu():
    with pytest.raises(ConfigError, match="model.ffn.activation = 'swiglu'.*Did you mean 'reglu'"):
        FatRelu().check(model("swiglu").config)
    with pytest.raises(ConfigError, match="threshold"):
        FatRelu(-1.0).check(model().config)


def test_gated_forms_of_shifted_and_fat_relu_are_their_gate_times_up():
    g, u = (jnp.asarray(np.random.default_rng(i).standard_normal((4, 6)), jnp.float32) for i in (0, 1))
    for gated, plain in (("shifted_reglu:0.3", "shifted_relu:0.3"), ("fatreglu:0.3", "fatrelu:0.3")):
        spec = resolve("nonlinearity", gated)
        assert spec.gated and spec.has_gate_out and spec.second_moment == resolve("nonlinearity", plain).second_moment
        np.testing.assert_array_equal(spec({}, g, u), resolve("nonlinearity", plain)({}, g) * u)
        np.testing.assert_array_equal(spec.gate_out({}, g), resolve("nonlinearity", plain)({}, g))


# Q-Sparse (card C7)


def qsparse(text, x, w):
    return matmul(resolve("activation_op", text)(x, CTX), w)


def test_qsparse_gradients_are_those_of_its_card():
    x, w = jax.random.normal(jax.random.key(0), (3, 8)), jax.random.normal(jax.random.key(1), (8, 5))
    g = jax.random.normal(jax.random.key(2), (3, 5))
    order = np.argsort(-np.abs(np.asarray(x)), axis=-1)[:, :4]
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, order, True, -1)
    for ste in ("straight_through", "masked"):
        dx, dw = jax.vjp(lambda x, w, ste=ste: qsparse(f"topk:0.5,gradient={ste}", x, w), x, w)[1](g)
        np.testing.assert_allclose(dx, (g @ w.T) * (1 if ste == "straight_through" else mask), rtol=1e-5)
        np.testing.assert_allclose(dw, (np.asarray(x) * mask).T @ g, rtol=1e-5, atol=1e-6)


def test_qsparse_that_keeps_all_is_dense_and_its_rescaled_form_keeps_each_tokens_norm():
    x, w = jax.random.normal(jax.random.key(0), (3, 8)), jax.random.normal(jax.random.key(1), (8, 5))
    np.testing.assert_array_equal(qsparse("topk:1.0,rescale=true", x, w), x @ w)
    kept = dense(resolve("activation_op", "topk:0.25,gradient=straight_through,rescale=true")(x, CTX))
    np.testing.assert_allclose(jnp.linalg.norm(kept, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    assert (np.count_nonzero(kept, axis=-1) == 2).all()
    dense_model = model("relu2glu")
    sparse = dataclasses.replace(dense_model.config, inputs=("blocks.**=topk:1.0,gradient=straight_through,rescale=true",))
    np.testing.assert_array_equal(outputs(dense_model.rebuilt(sparse, {}))[0], outputs(dense_model)[0])
