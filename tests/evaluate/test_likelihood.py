"""Loss, bits per byte and accuracy from accumulated sums, against numpy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.evaluate.likelihood import calibration_error, evaluate, gather, label_sums, summarise, token_sums
from sparsejax.plugs import ConfigError


def batches_of(rng, count, batch=4, length=6, vocab=9):
    for _ in range(count):
        yield {
            "nll": rng.gamma(2.0, size=(batch, length)).astype(np.float32),
            "weights": (rng.random((batch, length)) < 0.7).astype(np.float32),
            "targets": rng.integers(0, vocab, (batch, length)).astype(np.int32),
        }


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 12))
def test_accumulated_metrics_equal_the_direct_sums_over_all_tokens(seed, count):
    batches = list(batches_of(np.random.default_rng(seed), count))
    token_bytes = np.arange(9) % 4
    result = evaluate(lambda b: token_sums(b["nll"], b["weights"], b["targets"], jnp.asarray(token_bytes)), batches)
    joined = {k: np.concatenate([b[k] for b in batches]).astype(np.float64) for k in batches[0]}
    total, tokens = (joined["nll"] * joined["weights"]).sum(), joined["weights"].sum()
    text_bytes = (token_bytes[joined["targets"].astype(int)] * joined["weights"]).sum()
    assert (result.tokens, result.bytes) == (tokens, text_bytes)
    assert result.loss == pytest.approx(total / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / text_bytes, rel=1e-6)
    assert math.isnan(result.accuracy)


def test_the_host_fetches_once_after_the_last_batch_was_dispatched():
    events = []
    step = jax.jit(lambda b: token_sums(b["nll"], b["weights"]))

    def dispatch(batch):
        events.append("step")
        return step(batch)

    def fetch(tree):
        events.append("fetch")
        return jax.device_get(tree)

    evaluate(dispatch, batches_of(np.random.default_rng(0), 12), fetch)
    assert events == ["step"] * 12 + ["fetch"]


def test_the_standard_error_is_that_of_repeated_sampling():
    rng = np.random.default_rng(3)
    losses, errors = [], []
    for _ in range(400):
        weight = rng.integers(1, 20, 50).astype(float)
        result = summarise({"nll": weight * rng.normal(2, 0.5, 50), "weight": weight})
        losses.append(result.loss)
        errors.append(result.loss_error)
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.1)


def test_equal_sequences_have_the_textbook_standard_error():
    nll = np.array([1.0, 2.0, 4.0, 5.0])
    result = summarise({"nll": nll, "weight": np.ones(4)})
    assert result.loss_error == pytest.approx(nll.std(ddof=1) / 2)


def test_labels_are_scored_with_their_weights_and_padding_rows_are_ignored():
    logits = jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [jnp.nan, 0.0]])
    sums = label_sums(logits, jnp.array([0, 1, 1, 0]), jnp.array([1.0, 1.0, 1.0, 0.0]))
    result = evaluate(lambda _: sums, [None])
    expected = np.mean([np.log1p(np.exp(-2.0)), np.log1p(np.exp(-1.0)), np.log1p(np.exp(3.0))])
    assert result.accuracy == pytest.approx(2 / 3) and result.sequences == 3
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert math.isnan(result.bits_per_byte)


def test_infinite_loss_at_a_masked_position_does_not_reach_the_mean():
    sums = token_sums(jnp.array([[1.0, jnp.inf]]), jnp.array([[1.0, 0.0]]))
    assert evaluate(lambda _: sums, [None]).loss == 1.0


def test_nothing_to_score_is_an_error_that_says_so():
    with pytest.raises(ConfigError, match="no batch"):
        evaluate(lambda b: b, [])
    with pytest.raises(ConfigError, match="masked"):
        evaluate(lambda _: token_sums(jnp.ones((2, 3)), jnp.zeros((2, 3))), [None])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 200), st.sampled_from([1, 5, 15]))
def test_the_calibration_error_is_the_gap_of_each_bin_weighted_by_its_share(seed, count, bins):
    rng = np.random.default_rng(seed)
    confidence = np.concatenate([rng.random(count), [1.0, 1 / bins]])  # a bin's upper edge belongs to it
    correct = (rng.random(count + 2) < confidence).astype(float)
    expected = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, correct, bins=bins) == pytest.approx(expected, abs=1e-12)


def test_who_is_always_sure_is_off_by_the_errors_and_who_is_as_sure_as_right_is_calibrated():
    right = np.arange(1000) % 10 < 7
    assert calibration_error(np.ones(1000), right) == pytest.approx(0.3)
    assert calibration_error(np.full(1000, 0.7), right) == pytest.approx(0, abs=1e-12)
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    assert calibration_error(confidence, rng.random(200_000) < confidence) < 0.01


def test_the_confidence_of_labels_is_that_of_the_likeliest_and_padding_does_not_count():
    logits = jnp.log(jnp.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.5, 0.5]]))
    sums = gather(lambda _: label_sums(logits, jnp.array([0, 0, 1, 1]), jnp.array([1.0, 1.0, 1.0, 0.0])), [None])
    np.testing.assert_allclose(sums["confidence"], [0.9, 0.6, 0.8, 0], rtol=1e-6)
    result = summarise(sums)
    assert result.calibration_error == pytest.approx((0.1 + 0.6 + 0.2) / 3, rel=1e-5)
    text = summarise({"nll": np.ones(2), "weight": np.ones(2), "correct": np.ones(2)})
    assert math.isnan(text.calibration_error)
