"""Activations rounded by token to any format: the numbers of the published divisors, and the products that follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.arrays import LowRank, QuantizedActivation, Residual, SparseActivation, dense, matmul
from sparsejax.context import Context
from sparsejax.methods.quant.rounded import Rounded
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError, resolve
from sparsejax.quantized_arrays import qtensor

RNG = np.random.default_rng(0)
X = (RNG.standard_normal((2, 3, 16)) * np.exp(RNG.standard_normal((2, 3, 1)))).astype(np.float32)
W = RNG.standard_normal((16, 5)).astype(np.float32)
CTX = Context(mode="prefill")
TRAIN = Context(mode="train")


def test_integers_are_divided_by_half_of_their_255_steps():
    found = Rounded("int8:full15,token")(jnp.asarray(X), CTX)
    amax = np.abs(X.astype(np.float64)).max(-1, keepdims=True)
    assert isinstance(found, QuantizedActivation)
    np.testing.assert_allclose(found.scale, amax / 127.5, rtol=2e-7)
    # The largest is at 127.5 of its own steps: which of its neighbours it becomes, the last bit of the scale decides.
    largest = np.abs(X) == np.abs(X).max(-1, keepdims=True)
    codes = np.asarray(found.codes)
    assert set(codes[largest].tolist()) <= {-128, -127, 127}
    np.testing.assert_array_equal(codes[~largest], np.round(X / (amax / 127.5))[~largest])


def test_the_product_is_one_of_integers():
    x, w = Rounded("int8:full15,token")(jnp.asarray(X), CTX), qtensor(jnp.asarray(W), FormatSpec.parse("int8:full15"))
    whole = np.asarray(x.codes, np.int64) @ np.asarray(w.unpacked(), np.int64)
    np.testing.assert_allclose(matmul(x, w), whole * np.asarray(x.scale, np.float64) * np.asarray(w.scale), rtol=1e-6)


def test_small_floats_are_divided_by_their_greatest_number():
    x = jnp.asarray([[448.0, 17.0, 0.1, 3.3], [44.8, -1.7, 0.0, 0.33]])  # the card: 17 -> 16, .1 -> .1015625, 3.3 -> 3.25
    wanted = [[448, 16, 0.1015625, 3.25], [44.8, -1.6, 0, 0.325]]
    np.testing.assert_allclose(dense(Rounded("fp8_e4m3:token")(x, CTX)), wanted, rtol=1e-6)


def test_entries_that_a_selector_dropped_set_no_scale_and_stay_zeros():
    mask = np.abs(X) < 0.5
    for text in ("int8:full15,token", "fp8_e4m3:token"):
        found = Rounded(text)(SparseActivation(jnp.asarray(X), jnp.asarray(mask)), CTX)
        values = np.asarray(dense(found))
        assert not values[~mask].any() and np.abs(values - X)[mask].max() < 0.04


@pytest.mark.parametrize("text", ["int8:full15,token", "int4:token", "fp8_e4m3:token", "int4:asym,group=8,axis=-1"])
def test_gradients_go_straight_through(text):
    op, w = Rounded(text), jnp.asarray(W)
    found = jax.grad(lambda x: jnp.sum(matmul(op(x, Context(mode="train")), w)))(jnp.asarray(X))
    np.testing.assert_allclose(found, np.broadcast_to(W.sum(-1), X.shape), rtol=1e-5, atol=1e-6)


def test_formats_whose_scales_belong_to_several_tokens_are_refused():
    for text, message in [
        ("int8", "granularity = 'channel': shares scales among tokens"),
        ("int8:token,static", "static = True"),
        ("nvfp4:axis=-1", "shares scales among tokens"),
        ("int8:token,round=stochastic", "round = 'stochastic'"),
        ("int9:token", "Did you mean 'int"),
    ]:
        with pytest.raises(ConfigError, match=message):
            resolve("activation_op", f"rounded:{text}", "model.inputs[0]")
    with pytest.raises(ConfigError, match="16 channels are no multiple of 5"):
        Rounded("int4:group=5,axis=-1").validate(16, "model.inputs[0]")


@pytest.mark.parametrize("spec", ["int8:full15,token", "fp8_e4m3:token"])
def test_what_a_selection_drops_is_still_there_for_who_multiplies_it(spec):
    """As R-Sparse does: the scale is that of the kept entries, and the dropped ones go through another product."""
    x = jnp.asarray(X)
    mask = jnp.abs(x) > jnp.median(jnp.abs(x), axis=-1, keepdims=True)
    weight = Residual(jnp.asarray(W), LowRank(jnp.asarray(W[:, :2]), jnp.asarray(W[:2, :5])), None)
    expected = jnp.where(mask, x, 0) @ weight.base + jnp.where(mask, 0, x) @ weight.dropped.dense()
    found = matmul(Rounded(spec)(SparseActivation(x, mask), CTX), weight)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    gradient = jax.grad(lambda x: jnp.sum(matmul(Rounded(spec)(SparseActivation(x, mask, "straight_through"), TRAIN), W)))(x)
    np.testing.assert_allclose(gradient, np.broadcast_to(W.sum(-1), X.shape), rtol=1e-5)


def test_formats_without_negative_numbers_are_refused_and_groups_by_their_field():
    with pytest.raises(ConfigError, match="log2_8.*has no negative numbers"):
        Rounded("log2_8:token")
    with pytest.raises(ConfigError, match=r"model.inputs\[3\]: format = .*16 channels are no multiple of 5"):
        Rounded("int4:group=5,axis=-1").validate(16, "model.inputs[3]")
