import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sparsejax import nnx_compat, plugs
from sparsejax.arrays import QTensor, QuantizedActivation, SparseActivation, dense, matmul
from sparsejax.compress.export import export, packed_values, report
from sparsejax.context import Context
from sparsejax.layers.ffn import FFN
from sparsejax.layers.linear import Linear
from sparsejax.layers.op import SiteRules
from sparsejax.methods.moe.softmax_top_k import SoftmaxTopK
from sparsejax.methods.quant.qat import Int4Weight, Int8Activation, Int8Weight
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.models.transformer import Transformer
from sparsejax.train.state import build

SERVE = Context(mode="prefill")
WEIGHTS = {"int8": Int8Weight(), "int4": Int4Weight()}


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_zero_channel_serves_zeros_and_its_gradient_is_finite(name):
    w = normal(0, (6, 5)).at[:, 2].set(0.0)
    x = normal(1, (3, 6)).at[1].set(0.0)

    def loss(x, w):
        return jnp.sum(matmul(Int8Activation()(x, Context()), WEIGHTS[name](w, Context())) ** 2)

    y = matmul(Int8Activation()(x, SERVE), WEIGHTS[name](w, SERVE))
    assert not y[:, 2].any() and not y[1].any()
    assert all(np.isfinite(g).all() for g in jax.grad(loss, (0, 1))(x, w))


def test_a_nan_or_infinity_is_not_hidden():
    for bad in (np.nan, np.inf):
        y = matmul(Int8Activation()(normal(0, (2, 6)).at[1, 2].set(bad), SERVE), Int8Weight()(normal(1, (6, 4)), SERVE))
        assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()


def fake_quant(x, axis, greatest):
    """x + sg(q - x): the straight-through estimator as a formula on floats."""
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / greatest
    return x + jax.lax.stop_gradient(jnp.round(x / scale) * scale - x)


@pytest.mark.parametrize("name", WEIGHTS)
def test_gradients_are_those_of_the_fake_quant_formula(name):
    x, w, r = normal(0, (5, 12)), normal(1, (12, 7)), normal(2, (5, 7))
    greatest = {"int8": 127, "int4": 7}[name]

    def ours(x, w):
        return jnp.sum(r * jnp.tanh(matmul(Int8Activation()(x, Context()), WEIGHTS[name](w, Context()))))

    def formula(x, w):
        xq = fake_quant(x, -1, 127)
        wq = fake_quant(w, 0, greatest)
        return jnp.sum(r * jnp.tanh(xq @ wq))

    for got, expected in zip(jax.grad(ours, (0, 1))(x, w), jax.grad(formula, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["masked", "straight_through"])
def test_a_quantized_sparse_activation_is_the_masked_tensor_quantized_by_what_is_kept(gradient):
    x, w, r = normal(0, (5, 12)), normal(1, (12, 7)), normal(2, (5, 7))
    mask = jnp.abs(x) < 0.8  # the largest are dropped: the scale must not come from them

    def ours(x, w):
        encoded = Int8Activation()(SparseActivation(x, mask, gradient), Context())
        return jnp.sum(r * matmul(encoded, Int8Weight()(w, Context())))

    def formula(x, w):
        kept = jnp.where(mask, x, 0)
        if gradient == "straight_through":
            kept = x + jax.lax.stop_gradient(kept - x)
        xq = fake_quant(kept, -1, 127)
        return jnp.sum(r * (xq @ fake_quant(w, 0, 127)))

    encoded = Int8Activation()(SparseActivation(x, mask, gradient), SERVE)
    assert isinstance(encoded.values, QuantizedActivation) and encoded.dtype == x.dtype
    np.testing.assert_array_equal(dense(encoded)[~mask], 0)
    np.testing.assert_allclose(ours(x, w), formula(x, w), rtol=1e-4)
    for got, expected in zip(jax.grad(ours, (0, 1))(x, w), jax.grad(formula, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", [Int8Activation(100), Int8Weight(100), Int4Weight(100)])
def test_before_its_start_an_op_leaves_its_operand_alone(op):
    x = normal(0, (4, 4))
    assert op(x, Context(stage=0)) is x
    assert op(x, Context(stage=100)) is not x
    assert op(x, SERVE) is not x
    assert SiteRules(weights=(("**", (op,)),)).boundaries() == (100,)


def test_training_carries_a_surrogate_and_serving_does_not():
    w = normal(0, (4, 4))
    assert Int8Weight()(w, Context(mode="train")).surrogate is w
    assert Int8Weight()(w, SERVE).surrogate is None
    packed = Int4Weight()(w, SERVE)
    assert packed.codes.shape == (4, 2) and packed.codes.dtype == jnp.uint8
    assert Int4Weight()(packed, Context(mode="train")) is packed


def config(activation="swiglu"):
    return ModelConfig(d_model=16, ffn=FFNConfig(hidden=32, activation=activation, bias=True))


def modules(weight_op):
    """A dense FFN and a mixture of experts, quantized everywhere, up to the hidden vector that stays float."""
    rules = SiteRules.parse(("blocks.**=int8",), (f"blocks.**=int{weight_op}",))
    arguments = dict(key=jax.random.key(0), site="blocks.0.mlp", rules=rules)
    return {
        "ffn": nnx_compat.split(FFN(config(), **arguments)),
        "moe": nnx_compat.split(SoftmaxTopK(4, 2).build(config("relu"), **arguments)),
    }


@pytest.mark.parametrize(
    ("kind", "bits", "dtype"), [("ffn", 8, "float32"), ("moe", 4, "float32"), ("ffn", 4, "bfloat16"), ("moe", 8, "bfloat16")]
)
def test_training_evaluation_and_the_exported_model_serve_the_same_bits(kind, bits, dtype):
    structure, values = modules(bits)[kind]
    x = normal(3, (2, 5, 16)).astype(dtype)

    def forward(mode):
        return jax.jit(lambda v, x: build(structure, v, dtype)(x, Context(mode=mode))[0])

    exported = export(structure, values, dtype)
    served = forward("prefill")
    expected = served(values, x)
    np.testing.assert_array_equal(forward("train")(values, x), expected)
    np.testing.assert_array_equal(served(exported.values, x), expected)
    assert {row.format for row in exported.rows} == {f"int{bits}"}
    assert len(exported.rows) == {"ffn": 3, "moe": 2}[kind]
    assert exported.bytes_after < exported.bytes_before / {8: 2.5, 4: 3.5}[bits]
    assert f"{exported.bytes_after:,}" in report(exported)


def test_an_exported_tree_is_restored_by_orbax_into_its_abstract_shapes(tmp_path):
    structure, values = modules(4)["moe"]
    exported = export(structure, values).values
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", exported)
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda v: packed_values(structure, v, "float32"), values)
        restored = checkpointer.restore(tmp_path / "model", shapes)
    assert isinstance(restored["experts"]["up"]["kernel"], QTensor)
    assert jax.tree.structure(restored) == jax.tree.structure(exported)
    jax.tree.map(np.testing.assert_array_equal, restored, exported)


def test_stacked_layers_are_exported_as_each_layer_alone():
    w = normal(0, (3, 2, 7, 6))
    stacked = Int4Weight().encode(w)
    for layer in range(3):
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.tree.map(lambda a, i=layer: a[i], stacked),
            Int4Weight().encode(w[layer]),
        )


def test_exporting_a_model_without_quantized_weights_is_refused():
    structure, values = nnx_compat.split(Linear(4, 4, key=jax.random.key(0), site="head", axes=("embed", "vocab")))
    with pytest.raises(plugs.ConfigError, match="model.weights"):
        export(structure, values)


def test_training_with_quantized_weights_learns():
    x, target = normal(0, (64, 8)), normal(1, (64, 8))
    target = x @ normal(2, (8, 8)) + 0.0 * target

    def loss(w):
        return jnp.mean((matmul(Int8Activation()(x, Context()), Int8Weight()(w, Context())) - target) ** 2)

    w, step = normal(3, (8, 8)), jax.jit(jax.value_and_grad(loss))
    first, _ = step(w)
    for _ in range(60):
        value, gradient = step(w)
        w = w - 0.5 * gradient
    assert value < 1e-3 * first
    assert step._cache_size() == 1


def test_a_negative_start_is_refused_with_its_field():
    with pytest.raises(plugs.ConfigError, match=r"model.weights\[0\].*start = -1"):
        SiteRules.parse((), ("**=int8:-1",))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_transformer_gives_the_same_logits_bit_for_bit(dtype):
    model = ModelConfig(
        num_layers=2, d_model=16, vocab_size=11, max_length=8, dtype=dtype,
        feed_pattern=("ffn", "moe:experts=2,k=2"), inputs=("blocks.**=int8",),
        weights=("blocks.*.attn.*=int8", "blocks.**=int4"), ffn=FFNConfig(hidden=32, activation="relu"),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    )
    structure, values = nnx_compat.split(Transformer(model, jax.random.key(0)))
    batch = {"tokens": jnp.arange(16).reshape(2, 8) % 11, "segment_ids": jnp.ones((2, 8), jnp.int32)}
    logits = jax.jit(lambda v: build(structure, v, dtype)(batch, SERVE)[0])
    exported = export(structure, values, dtype)
    np.testing.assert_array_equal(logits(values), logits(exported.values))
    assert {row.format for row in exported.rows} == {"int4", "int8"} and len(exported.rows) == 4 * 2 + 2 + 2
