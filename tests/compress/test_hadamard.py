"""The online Hadamard transform against the dense product, and what it refuses to be combined with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.recipes import cats
from sparsejax import plugs
from sparsejax.arrays import QuantizedActivation
from sparsejax.compress.basis import hadamard_basis
from sparsejax.compress.hadamard import check_online, check_unrotated, hadamard_transform, rotate_online, transform_rows
from sparsejax.compress.head_bases import check_heads, merge_heads
from sparsejax.compress.recipe import check_recipe
from sparsejax.compress.scaling import verify_equivalence
from sparsejax.compress.surgery import Placed, place
from sparsejax.compress.transforms import check_mergeable
from sparsejax.context import Context
from sparsejax.methods.quant.inputs import QuantizedInputs
from sparsejax.methods.quant.quarot import OnlineRotate, RotateValues
from sparsejax.methods.sparsity.chess import Chess
from sparsejax.methods.sparsity.deja_vu import DejaVu
from sparsejax.methods.sparsity.fatrelu import FatRelu
from sparsejax.methods.sparsity.griffin import Griffin
from sparsejax.methods.sparsity.rotate import Rotate
from sparsejax.methods.sparsity.teal import Teal
from sparsejax.plugs import ConfigError
from tests.compress.tiny import tiny_model

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 16), np.int32)
SERVE = Context(mode="prefill")


@functools.cache
def biased():
    """Two layers, grouped queries, biases that are not zero."""
    model = tiny_model(layers=2, unroll=1)
    config = dataclasses.replace(model.config, attention=dataclasses.replace(model.config.attention, bias=True))
    shapes = {"q": 32, "k": 16, "v": 16}
    rng = np.random.default_rng(1)
    drawn = {name: rng.normal(size=(2, size)) for name, size in shapes.items()}
    biases = {f"blocks.{i}.attn.{n}.bias": jnp.asarray(b[i], jnp.float32) for n, b in drawn.items() for i in range(2)}
    return model.rebuilt(config, biases)


@pytest.mark.parametrize("width, heads", [(1, 1), (24, 1), (56, 1), (18, 1), (1536, 1), (576, 9)])
def test_the_fast_transform_is_the_dense_product(width, heads):
    x = np.random.default_rng(width).normal(size=(5, width)).astype(np.float32)
    basis = np.kron(np.eye(heads), hadamard_basis(width // heads))
    np.testing.assert_allclose(hadamard_transform(x, heads), x.astype(np.float64) @ basis, atol=2e-6)
    np.testing.assert_allclose(transform_rows(x.T, heads), basis.T @ x.T.astype(np.float64), atol=1e-13)


@given(st.integers(1, 60), st.integers(1, 3), st.integers(0, 10**6))
def test_what_is_merged_into_a_kernel_undoes_the_transform_at_every_width(width, heads, seed):
    rng = np.random.default_rng(seed)
    x, kernel = rng.normal(size=(3, width * heads)), rng.normal(size=(2, width * heads, 4))
    rotated = x @ np.kron(np.eye(heads), hadamard_basis(width))
    np.testing.assert_allclose(rotated @ transform_rows(kernel, heads), x @ kernel, atol=1e-10)


def test_it_keeps_lengths_and_its_gradient_is_the_transpose():
    x, r = np.random.default_rng(0).normal(size=(2, 3, 24)).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(hadamard_transform(x), axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(hadamard_transform(x) * r))(x)
    np.testing.assert_allclose(gradient, r @ hadamard_basis(24).T, atol=1e-6)


def test_a_single_channel_is_spread_evenly():
    spread = np.asarray(hadamard_transform(np.eye(48, dtype=np.float32)[:7]))
    np.testing.assert_allclose(np.abs(spread), 48**-0.5, rtol=1e-6)


def test_it_is_float32_inside_and_gives_the_dtype_that_it_was_given():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), jnp.bfloat16)
    got, exact = hadamard_transform(x), np.asarray(x, np.float64) @ hadamard_basis(64)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.asarray(exact, jnp.bfloat16))


def test_in_a_chain_four_bits_round_what_was_rotated():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 24)), jnp.float32).at[:, 5].set(40.0)
    y = x
    for op in plugs.resolve_chain("activation_op", "hadamard|int4"):
        y = op(y, SERVE)
    assert isinstance(y, QuantizedActivation) and y.codes.dtype == jnp.int8 and np.abs(y.codes).max() == 7
    rotated = np.asarray(hadamard_transform(x))
    scale = np.abs(rotated).max(-1, keepdims=True) / 7
    np.testing.assert_allclose(y.dequantize(), np.round(rotated / scale) * scale, rtol=1e-5, atol=1e-6)
    (plain,) = plugs.resolve_chain("activation_op", "int4")
    error = [float(np.sum((np.asarray(q.dequantize()) - of) ** 2)) for q, of in ((y, rotated), (plain(x, SERVE), x))]
    assert error[1] > 2 * error[0]  # an outlier takes the scale of all other channels


def test_the_transform_and_its_inverse_in_the_kernel_cancel():
    model = biased()
    turned = rotate_online(model, {"blocks.0.attn.o": 1, "blocks.1.attn.o": 4, "blocks.0.mlp.down": 1, "blocks.1.mlp.down": 1})
    assert verify_equivalence(model, turned, TOKENS) < 1e-5
    assert not np.allclose(turned.parameter("blocks.0.mlp.down.kernel"), model.parameter("blocks.0.mlp.down.kernel"))
    assert check_mergeable(turned.config)  # a basis of the residual stream can still be merged


def test_experts_are_transformed_one_by_one():
    model = tiny_model(layers=1, width=16, hidden=24, feed_pattern=("moe:experts=2,k=1,combine=raw,hidden=24",))
    turned = rotate_online(model, {"blocks.0.mlp.experts.down": 1})
    assert verify_equivalence(model, turned, TOKENS) < 1e-5


@pytest.mark.parametrize("kind", ["orthogonal", "any"])
def test_a_basis_between_v_and_o_changes_no_logit(kind):
    model, rng = biased(), np.random.default_rng(0)
    bases = rng.normal(size=(2, 2, 8, 8))
    bases = np.linalg.qr(bases)[0] if kind == "orthogonal" else bases + 3 * np.eye(8)
    turned = merge_heads(model, dict(enumerate(bases)))
    assert verify_equivalence(model, turned, TOKENS) < 1e-5
    v = np.asarray(model.parameter("blocks.0.attn.v.kernel"))[:, 8:]
    np.testing.assert_allclose(np.asarray(turned.parameter("blocks.0.attn.v.kernel"))[:, 8:], v @ bases[0][1], atol=1e-5)


@pytest.mark.parametrize("bases, message", [
    ({7: np.eye(8)}, "the model has 2 layers"),
    ({0: np.eye(8)}, r"must be \(2, 8, 8\)"),
    ({0: np.zeros((2, 8, 8))}, "condition number"),
])  # fmt: skip
def test_bases_of_heads_are_checked(bases, message):
    with pytest.raises(ConfigError, match=message):
        merge_heads(biased(), bases)


def with_inputs(*rules, **fields):
    return dataclasses.replace(tiny_model(layers=2).config, inputs=rules, **fields)


@pytest.mark.parametrize("chain, message", [
    ("topk:0.5|hadamard", "must be the only one and stand before"),
    ("int4|hadamard", "must be the only one and stand before"),
    ("hadamard|hadamard", "must be the only one and stand before"),
    ("hadamard:heads=5|int4", "does not divide the 64 channels"),
])  # fmt: skip
def test_a_chain_in_which_a_rotation_cannot_stand_is_refused(chain, message):
    model = tiny_model(layers=1)
    with pytest.raises(ConfigError, match=message):
        place(model, "inputs", {"blocks.0.mlp.down": Placed(chain)})


def test_what_is_not_linear_is_refused_naming_the_site():
    for config, site in (
        (with_inputs("blocks.1.mlp.down=int8"), r"blocks.1.mlp.down: model.inputs = 'int8'"),
        (with_inputs(weights=("blocks.0.mlp.down=int4",)), r"blocks.0.mlp.down: model.weights = 'int4'"),
    ):
        with pytest.raises(ConfigError, match=site):
            check_online(config, {"blocks.0.mlp.down": 1, "blocks.1.mlp.down": 1})
    with pytest.raises(ConfigError, match="blocks.1.attn.o: model.inputs = 'topk:0.5'"):
        check_heads(with_inputs("blocks.1.attn.o=topk:0.5"))
    with pytest.raises(ConfigError, match="blocks.0.residual.mlp"):
        check_online(with_inputs(), {"blocks.0.residual.mlp": 1})


NEURONS = [cats.get_recipe("0.5")[0], Chess(0.5), DejaVu(0.5), Griffin(0.5)]


@pytest.mark.parametrize("chosen", NEURONS, ids=[type(one).__name__ for one in NEURONS])
def test_an_online_rotation_at_down_and_a_choice_of_hidden_units_exclude_each_other_in_both_orders(chosen):
    config = tiny_model(layers=2).config
    with pytest.raises(ConfigError, match=rf"recipe\[1\] \({chosen.name}\): .*blocks.0.mlp"):
        check_recipe([OnlineRotate(), chosen], config)
    check_recipe([Rotate("hadamard"), RotateValues(), chosen], config)  # R1 and R2 leave the hidden units as they are
    with pytest.raises(ConfigError, match=r"recipe\[1\] \(onlinerotate\): blocks.0.mlp"):
        check_recipe([chosen, OnlineRotate()], config)


def test_a_model_whose_hidden_units_are_selected_already_is_refused_by_site():
    config = with_inputs(neurons=("blocks.1.mlp=gate_threshold",))
    with pytest.raises(ConfigError, match=r"blocks.1.mlp: model.neurons = \['GateThreshold'\].*rotation at blocks.1.mlp.down"):
        OnlineRotate().check(config)
    relu = tiny_model(layers=2, activation="reglu").config
    with pytest.raises(ConfigError, match=r"recipe\[1\] \(fatrelu\): blocks.0.mlp.down: model.inputs = 'hadamard'"):
        check_recipe([OnlineRotate(), FatRelu()], relu)
    check_unrotated(relu, "fatrelu")


def test_entries_may_be_selected_in_the_rotated_basis_and_rounded_after():
    check_recipe([OnlineRotate(), Teal(0.4), QuantizedInputs("int4")], tiny_model(layers=2).config)
