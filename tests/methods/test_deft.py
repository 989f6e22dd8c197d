"""The density loss of DEFT and Hoyer's measure: the card's oracle, padding, two stacks, microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.context import Context, Stat
from sparsejax.methods.sparsity.deft import Deft, Hoyer, hoyer_density, smooth_density
from sparsejax.plugs import ConfigError, resolve
from sparsejax.train.loss import Outputs

OUTPUTS = Outputs(*(jnp.zeros(()) for _ in range(4)))


def oracle(a, eps=1e-7):
    return np.mean(a**2 / (a**2 + eps))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 12), st.sampled_from([1e-7, 1e-4, 1e-2]), st.integers(0, 99))
def test_the_surrogate_is_its_equation_in_float64(width, eps, seed):
    a = np.random.default_rng(seed).standard_normal((3, width)) * 10.0 ** np.random.default_rng(seed).integers(-4, 2)
    np.testing.assert_allclose(np.mean(smooth_density(jnp.asarray(a, jnp.float32), eps)), oracle(a, eps), rtol=1e-5)


def test_the_surrogate_is_zero_at_zero_half_at_root_epsilon_and_density_in_the_limit():
    assert smooth_density(jnp.zeros(4), 1e-7) == 0
    assert smooth_density(jnp.array([1e-2]), 1e-4) == pytest.approx(0.5, rel=1e-6)
    a = jnp.array([0.0, 0.3, 0.0, -2.0, 1.0])
    assert smooth_density(a, 1e-12) == pytest.approx(0.6, rel=1e-6)
    gradient = jax.grad(lambda v: smooth_density(v, 1e-7))(jnp.array([1.0]))
    assert float(gradient[0]) == pytest.approx(2e-7, rel=1e-3)
    assert smooth_density(a.astype(jnp.bfloat16), 1e-7).dtype == jnp.float32


def test_hoyer_is_one_for_equal_entries_and_one_over_f_for_a_single_one_with_no_gradient_at_silent_units():
    assert hoyer_density(jnp.full(8, -3.0)) == pytest.approx(1.0)
    assert hoyer_density(jnp.eye(8)[2] * 5) == pytest.approx(1 / 8)
    assert hoyer_density(jnp.zeros(8)) == 0
    gradient = jax.grad(lambda v: hoyer_density(v))(jnp.array([0.0, 2.0, 1.0]))
    assert gradient[0] == 0 and np.isfinite(gradient).all()


def term(objective, hidden, batch, **sites):
    """What the loss gets of an objective from hidden vectors [L, B, T, F] of stacks by prefix."""
    stats = {}
    for prefix, tensor in {"": hidden, **sites}.items() if hidden is not None else sites.items():
        key = "encoder_segment_ids" if prefix == "encoder." else "segment_ids"
        layers = [objective.probes()[0].measure(h, Context(segment_ids=batch.get(key))) for h in tensor]
        stats[f"{prefix}mlp.hidden"] = {
            name: Stat(jnp.stack([found[name].value for found in layers])) for name in layers[0]
        }
    return objective.numerator(OUTPUTS, batch, stats, 0) / objective.denominator(batch)


def test_padding_is_left_out_and_layers_are_averaged():
    hidden = np.random.default_rng(0).standard_normal((3, 2, 4, 5)).astype(np.float32)
    segments = jnp.array([[1, 1, 2, 0], [1, 0, 0, 0]])
    batch = {"segment_ids": segments, "weights": jnp.ones((2, 4))}
    used = hidden[:, np.asarray(segments) > 0]
    assert term(Deft(2.0, 1e-2), hidden, batch) == pytest.approx(2 * oracle(used.astype(np.float64), 1e-2), rel=1e-5)
    assert term(Deft(0.0), hidden, batch) == 0


def test_both_stacks_of_an_encoder_decoder_count():
    rng = np.random.default_rng(1)
    encoder, decoder = rng.standard_normal((2, 2, 4, 5)), rng.standard_normal((2, 2, 3, 5))
    batch = {
        "segment_ids": jnp.array([[1, 1, 1], [1, 1, 0]]), "encoder_segment_ids": jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]]),
        "weights": jnp.ones((2, 3)),
    }  # fmt: skip
    rows = np.concatenate([encoder[:, np.asarray(batch["encoder_segment_ids"]) > 0].reshape(-1, 5),
                           decoder[:, np.asarray(batch["segment_ids"]) > 0].reshape(-1, 5)])
    sites = {"encoder.": jnp.asarray(encoder, jnp.float32), "decoder.": jnp.asarray(decoder, jnp.float32)}
    assert term(Deft(1.0, 1e-2), None, batch, **sites) == pytest.approx(oracle(rows, 1e-2), rel=1e-5)


def test_images_without_segments_are_averaged_over_their_tokens():
    hidden = np.random.default_rng(2).standard_normal((2, 3, 4, 5)).astype(np.float32)
    batch = {"weights": jnp.ones(3), "labels": jnp.zeros(3, jnp.int32)}
    assert term(Deft(1.0, 1e-2), hidden, batch) == pytest.approx(oracle(hidden.astype(np.float64), 1e-2), rel=1e-5)


def test_specs_are_found_by_name_and_refuse_what_is_no_loss():
    assert resolve("objective", "deft:0.1,1e-3") == Deft(0.1, 1e-3) and resolve("objective", "hoyer:0.2") == Hoyer(0.2)
    for text in ("deft:-1", "deft:1,0", "hoyer:inf"):
        with pytest.raises(ConfigError):
            resolve("objective", text)
    with pytest.raises(ConfigError, match="found no tensor at site"):
        Deft().numerator(OUTPUTS, {"segment_ids": jnp.ones((1, 2))}, {}, 0)
