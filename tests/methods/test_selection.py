"""Trained top-k as an activation op: exact counts, both gradients, and equality with the dense map when all is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.arrays import QuantizedActivation, SparseActivation, matmul
from sparsejax.context import Context
from sparsejax.methods.sparsity.selection import BlockTopK, StatTopK, TopK
from sparsejax.plugs import ConfigError, resolve

CTX = Context()


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_spec_strings_name_the_three_ops():
    assert resolve("activation_op", "topk:0.05") == TopK(fraction=0.05)
    assert resolve("activation_op", "topk:k=8,gradient=straight_through") == TopK(k=8, gradient="straight_through")
    assert resolve("activation_op", "block_topk:0.5,block=32") == BlockTopK(0.5, 32)
    assert resolve("activation_op", "stat_topk:0.1") == StatTopK(0.1)
    assert round(3072 * TopK().fraction) == 128


def dense(op, x):
    return np.asarray(jax.jit(lambda v: op(v, CTX).dense())(x))


KEPT = [(64, TopK(0.25), 16), (10, TopK(k=3), 3), (10, TopK(0.001), 1), (64, BlockTopK(0.5, 8), 32)]


@pytest.mark.parametrize("features, op, kept", KEPT)
def test_exactly_k_entries_are_kept_also_among_ties(features, op, kept):
    encode = jax.jit(lambda x: op(x, CTX))
    for x in (normal(4, 5, features), jnp.round(normal(4, 5, features)), jnp.zeros((4, 5, features))):
        operand = encode(x)
        assert isinstance(operand, SparseActivation)
        assert (np.asarray(operand.mask).sum(-1) == kept).all()
        np.testing.assert_array_equal(operand.values, x)


def test_magnitude_keeps_large_negative_entries_and_value_does_not():
    x = jnp.asarray([[3.0, -9.0, 1.0, 2.0]])
    np.testing.assert_array_equal(dense(TopK(0.5), x), [[3, -9, 0, 0]])
    np.testing.assert_array_equal(dense(TopK(0.5, score="value"), x), [[3, 0, 0, 2]])
    np.testing.assert_array_equal(dense(TopK(0.5), jnp.abs(x)), dense(TopK(0.5, score="value"), jnp.abs(x)))


def test_nonzeros_per_token_never_exceed_k_behind_a_relu():
    h = jax.nn.relu(normal(8, 64) - 1)
    sparse = dense(TopK(k=16), h)
    assert ((sparse != 0).sum(-1) <= 16).all()
    few = np.asarray(h > 0).sum(-1) <= 16
    np.testing.assert_array_equal(sparse[few], np.asarray(h)[few])


def test_permuting_the_units_permutes_the_mask():
    x, order = normal(4, 32), np.random.default_rng(1).permutation(32)
    np.testing.assert_array_equal(dense(TopK(0.25), x[:, order]), dense(TopK(0.25), x)[:, order])


@pytest.mark.parametrize("op", [TopK(1.0), TopK(k=32), BlockTopK(1.0, 8), StatTopK(1.0)])
def test_keeping_everything_is_the_dense_map_bit_for_bit(op):
    x, w = normal(4, 32), normal(32, 8, seed=1)
    assert op(x, CTX) is x

    def loss(multiply):
        return jax.jit(jax.value_and_grad(lambda a, b: jnp.sum(multiply(a, b) ** 2), argnums=(0, 1)))(x, w)

    behind = loss(lambda a, b: matmul(op(a, CTX), b))
    for ours, plain in zip(jax.tree.leaves(behind), jax.tree.leaves(loss(matmul)), strict=True):
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("op", [TopK(0.25), BlockTopK(0.25, 4)])
@pytest.mark.parametrize("gradient", ["masked", "straight_through"])
def test_gradients_of_a_map_behind_topk(op, gradient):
    """Masked: dx = (dy w^T) * m. Straight through: dx = dy w^T. In both dw has no row for a dropped channel."""
    op = type(op)(**{**vars(op), "gradient": gradient})
    x, w, dy = normal(1, 32), normal(32, 8, seed=1), normal(1, 8, seed=2)

    @jax.jit
    def forward_and_backward(a, b):
        y, pull = jax.vjp(lambda a, b: matmul(op(a, CTX), b), a, b)
        return y, *pull(dy), op(a, CTX).mask

    y, dx, dw, mask = map(np.asarray, forward_and_backward(x, w))
    np.testing.assert_allclose(y, np.where(mask, x, 0) @ np.asarray(w), rtol=1e-5, atol=1e-5)
    passed = np.asarray(dy @ w.T)
    np.testing.assert_allclose(dx, np.where(mask, passed, 0) if gradient == "masked" else passed, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(dw)[~mask[0]], 0)
    assert np.all(np.asarray(dw)[mask[0]] != 0)


def test_statistical_topk_is_a_soft_threshold_whose_mask_is_its_support():
    operand = StatTopK(0.1)(normal(50, 2048), CTX)
    np.testing.assert_array_equal(operand.mask, operand.values > 0)
    np.testing.assert_array_equal(operand.dense(), operand.values)
    assert np.asarray(operand.mask).mean() == pytest.approx(0.1, rel=0.03)


def test_statistical_topk_can_hold_its_threshold_constant():
    x = normal(2, 64)
    slopes = [jax.grad(lambda v, op=StatTopK(0.1, flag): jnp.sum(op(v, CTX).dense()))(x) for flag in (True, False)]
    np.testing.assert_array_equal(slopes[1], StatTopK(0.1)(x, CTX).mask)
    # Through the statistics a common shift moves nothing, so the slopes of a row sum to zero.
    np.testing.assert_allclose(np.sum(slopes[0], axis=-1), 0, atol=1e-5)


def test_a_quantized_input_keeps_its_codes_under_the_mask():
    codes = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (3, 16)), jnp.int8)
    x = QuantizedActivation(codes, jnp.full((3, 1), 0.1), None, jnp.float32)
    np.testing.assert_array_equal(dense(TopK(k=4), x), dense(TopK(k=4), x.dequantize()))
    assert TopK(k=4)(x, CTX).values is x


def test_bfloat16_in_bfloat16_out():
    for op in (TopK(0.25), BlockTopK(0.25, 4), StatTopK(0.25)):
        operand = jax.eval_shape(lambda x, op=op: op(x, CTX), jnp.zeros((3, 32), jnp.bfloat16))
        assert jax.eval_shape(lambda o: o.dense(), operand).dtype == jnp.bfloat16 and operand.mask.dtype == bool


def test_bad_widths_and_fields_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"model.inputs\[0\].*65.*64"):
        TopK(k=65).validate(64, "model.inputs[0]")
    with pytest.raises(ConfigError, match=r"model.inputs\[0\].*12.*64"):
        BlockTopK(block=12).validate(64, "model.inputs[0]")
    StatTopK().validate(7, "model.inputs[0]")
    with pytest.raises(ConfigError, match="65.*64"):
        TopK(k=65)(jnp.zeros((1, 64)), CTX)
    wrong = {"topk:1.5": "fraction", "topk:gradient=mask": "masked", "topk:score=size": "magnitude", "topk:k=-2": "k = -2",
             "block_topk:0": "fraction", "block_topk:block=0": "block = 0", "stat_topk:2": "fraction"}  # fmt: skip
    for text, word in wrong.items():
        with pytest.raises(ConfigError, match=word):
            resolve("activation_op", text)


def test_a_scanned_and_rematerialised_block_with_topk_trains():
    def block(h, w):
        return h + matmul(TopK(0.25)(jax.nn.relu(matmul(h, w[0])), CTX), w[1]), None

    weights = normal(3, 2, 16, 16) * 0.2
    loss = lambda w: jnp.sum(jax.lax.scan(jax.checkpoint(block), normal(4, 16), w)[0] ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(weights)
    assert np.isfinite(gradient).all() and float(jnp.abs(gradient).min()) == 0 < float(jnp.abs(gradient).max())
