"""ProAct: the clipping function of its card, bounds from calibration, and what bounds do against flipped bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import nnx_compat
from sparsejax.arrays import dense
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, run_recipe
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.context import Context
from sparsejax.data.config import DataConfig
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.proact import BoundActivations, ProAct, clip_to_zero, flip_bits
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.models.transformer import Transformer
from sparsejax.plugs import ConfigError

CTX = Context(mode="prefill")


@settings(max_examples=8, deadline=None)
@given(st.floats(0.1, 50), st.floats(0.5, 40), st.integers(0, 99))
def test_on_inputs_that_are_not_negative_it_is_the_released_codes_equation(bound, steepness, seed):
    x = np.abs(np.random.default_rng(seed).standard_normal(32)) * bound
    expected = np.maximum(0, x - x / (1 + np.exp(np.minimum(-steepness * (x - bound), 500))))
    found = clip_to_zero(jnp.asarray(x, jnp.float32), jnp.float32(bound), steepness)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * bound)


def test_far_below_it_is_the_identity_far_above_zero_and_faults_are_zero_with_finite_gradients():
    x = jnp.array([0.5, -1.0, 100.0, -3e38, jnp.inf, -jnp.inf, jnp.nan])
    found, pull = jax.vjp(lambda v, b: clip_to_zero(v, b, 20.0), x, jnp.float32(6.0))
    np.testing.assert_array_equal(found, [0.5, -1.0, 0, 0, 0, 0, 0])
    assert all(np.isfinite(g).all() for g in pull(jnp.ones(7)))
    hard = clip_to_zero(jnp.array([0.99, 1.01]), jnp.float32(1.0), 1e6)
    np.testing.assert_allclose(hard, [0.99, 0.0])
    np.testing.assert_array_equal(clip_to_zero(x[:2], jnp.float32(1e30), 20.0), x[:2])


def test_its_bound_is_trained_and_may_be_one_per_channel():
    spec = ProAct(2.0, per_channel=True)
    (bound,) = spec.parameters((4, 3), ("mlp", "embed"), jax.random.key(0)).values()
    assert bound.shape == (4,) and bound.role == "nonlinearity" and bound.axes == ("mlp",)
    gradient = jax.grad(lambda b: jnp.sum(dense(spec({"bound": b}, jnp.full((2, 4), 2.0), CTX))))(bound.get_value())
    assert gradient.shape == (4,) and (gradient > 0).all()


def test_calibrated_bounds_leave_a_model_as_it_was():
    config = finalize(ExperimentConfig(
        model=ModelConfig(num_layers=2, d_model=16, vocab_size=40, attention=AttentionConfig(num_heads=2),
                          ffn=FFNConfig(hidden=24, activation="reglu")),
        data=DataConfig(source="copy", sequence_length=8),
    )).model
    structure, values = nnx_compat.split(Transformer(config, jax.random.key(1)))
    base, tokens = Model("tiny", config, structure, values), np.random.default_rng(0).integers(0, 40, (4, 8)).astype(np.int32)
    work = Work(Calibration(CalibrationSpec(), tokens, ""), TIERS["quick"])
    bounded = run_recipe([BoundActivations(margin=3.0)], base, work)
    assert bounded.config.inputs == ("blocks.*.mlp.down=proact",)
    bounds = [float(bounded.parameter(f"blocks.{layer}.mlp.down.inputs.0.bound")) for layer in range(2)]
    assert list(work.notes["0-boundactivations"]["bounds"].values()) == pytest.approx(bounds) and bounds[0] != bounds[1]
    before, after = (nnx_compat.merge(m.structure, m.values)({"tokens": tokens}, CTX)[0] for m in (base, bounded))
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="no site of this model"):
        BoundActivations(sites="blocks.*.mlp.out").check(config)


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.5])
def test_bits_are_flipped_independently_at_the_stated_rate(rate):
    x = jax.random.normal(jax.random.key(0), (200, 50))
    flipped = flip_bits(jax.random.key(1), {"w": x}, rate)["w"]
    changed = np.asarray(x).view(np.uint32) ^ np.asarray(flipped).view(np.uint32)
    shares = [np.mean(changed >> np.uint32(bit) & np.uint32(1)) for bit in range(32)]
    np.testing.assert_allclose(shares, rate, atol=6 * (rate * (1 - rate) / x.size) ** 0.5)


def digits_network(seed=0):
    """A two-layer ReLU network that classifies 8 x 8 digits: (weights, held-out images, labels)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    keys = jax.random.split(jax.random.key(seed))
    weights = [jax.random.normal(k, s) * s[0] ** -0.5 for k, s in zip(keys, ((64, 48), (48, 10)), strict=True)]

    def loss(w):
        scores = jax.nn.relu(x[:1200] @ w[0]) @ w[1]
        return -jnp.mean(jax.nn.log_softmax(scores)[jnp.arange(1200), y[:1200]])

    def descend(w, _):
        return jax.tree.map(lambda a, g: a - g, w, jax.grad(loss)(w)), None

    return jax.lax.scan(descend, weights, None, length=150)[0], x[1200:], y[1200:]


def test_bounded_activations_keep_a_network_right_under_bit_flips():
    weights, x, y = jax.jit(digits_network)()
    bound = 1.2 * jnp.max(x @ weights[0])

    def accuracy(w, clip):
        return jnp.mean(jnp.argmax(clip(jax.nn.relu(x @ w[0])) @ w[1], axis=-1) == y)

    def under_faults(clip):
        # Of the first layer alone: what passes a bound is then exactly what the second layer sees.
        faulty = lambda key: accuracy([flip_bits(key, weights[0], 5e-4), weights[1]], clip)  # noqa: E731
        return np.asarray(jax.jit(jax.vmap(faulty))(jax.random.split(jax.random.key(1), 50)))

    clean = float(accuracy(weights, lambda h: h))
    assert clean > 0.85
    plain, bounded = under_faults(lambda h: h), under_faults(lambda h: clip_to_zero(h, bound, 20.0))
    to_bound = under_faults(lambda h: jnp.minimum(jnp.nan_to_num(h), bound))
    assert bounded.mean() > clean - 0.03 and bounded.mean() > plain.mean() + 0.1
    assert bounded.mean() > to_bound.mean()
