import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import plugs
from sparsejax.context import Context, Stat
from sparsejax.methods.sparsity.prosparse import ScheduledL1, sine_stages

# ProSparse-7B.
PEAKS = (0.0, 5e-3, 5e-2, 5e-2, 2e-1, 2e-1)
ENDS = (5000, 6000, 10000, 12000, 16000, 16500)


def oracle(t, ends, peaks):
    """The schedule in float64."""
    if t <= ends[0]:
        return peaks[0]
    if t <= ends[1]:
        return peaks[1]
    for i in range(2, len(ends)):
        if t <= ends[i]:
            eta = 0.5 * (np.sin(-np.pi / 2 + np.pi * (t - ends[i - 1]) / (ends[i] - ends[i - 1])) + 1)
            return peaks[i - 1] + eta * (peaks[i] - peaks[i - 1])
    return peaks[-1]


@given(st.integers(0, 20000))
def test_the_schedule_equals_the_papers(step):
    np.testing.assert_allclose(sine_stages(step, ENDS, PEAKS), oracle(step, ENDS, PEAKS), rtol=1e-4, atol=1e-7)


def test_stages_end_at_their_peaks_and_pass_their_middle_halfway():
    for end, peak in zip(ENDS, PEAKS, strict=True):
        np.testing.assert_allclose(sine_stages(end, ENDS, PEAKS), peak, rtol=1e-6)
    np.testing.assert_allclose(sine_stages(8000, ENDS, PEAKS), (5e-3 + 5e-2) / 2, rtol=1e-5)


def test_the_schedule_rises_with_rising_peaks_and_jumps_only_after_the_first_stage():
    values = np.asarray(jax.vmap(lambda t: sine_stages(t, ENDS, PEAKS))(jnp.arange(0, 17000, 10)))
    assert (np.diff(values) >= -1e-8).all()
    jump = np.abs(np.diff(values))
    assert jump.argmax() == 500 and np.sort(jump)[-2] < 1e-3


def test_the_slope_is_zero_at_the_ends_of_a_rising_stage():
    slope = jax.grad(lambda t: sine_stages(t, (10.0, 20.0, 1020.0), (0.0, 0.0, 1.0)))
    assert abs(slope(20.5)) < 1e-5 and abs(slope(1020.0)) < 1e-5 and slope(520.0) > 1e-3


@pytest.mark.parametrize("stages", [1, 2])
def test_one_or_two_stages_are_constants(stages):
    ends, peaks = ENDS[:stages], PEAKS[1 : stages + 1]
    found = [float(sine_stages(t, ends, peaks)) for t in (0, 5500, 9000)]
    np.testing.assert_allclose(found, [peaks[0], peaks[-1], peaks[-1]])


def test_a_traced_step_compiles_once():
    compiled = jax.jit(lambda t: sine_stages(t, ENDS, PEAKS))
    for step in (0, 7000, 20000):
        np.testing.assert_allclose(compiled(jnp.asarray(step)), oracle(step, ENDS, PEAKS), rtol=1e-4)
    assert compiled._cache_size() == 1


def penalty(hidden, segments, weight=0.5):
    """The term as the train step computes it, for two layers with hidden vectors [2, B, T, F]."""
    term = ScheduledL1((weight,), (10,))
    batch = {"segment_ids": segments, "weights": jnp.ones(segments.shape)}
    (probe,) = term.probes()
    found = jax.vmap(lambda h: probe.measure(h, Context(segment_ids=segments)))(hidden)
    return term.numerator(None, batch, {"mlp.hidden": found}, 0) / term.denominator(batch)


def test_the_term_is_the_mean_over_tokens_of_the_norms_summed_over_layers():
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    segments = jnp.asarray([[1, 1, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    norms = np.abs(hidden).sum(-1)[:, np.asarray(segments) > 0]
    np.testing.assert_allclose(penalty(hidden, segments), 0.5 * norms.sum() / 4, rtol=1e-6)


def test_the_gradient_is_the_sign_over_the_tokens_and_nothing_for_silent_units_and_padding():
    hidden = jnp.maximum(jax.random.normal(jax.random.key(0), (2, 3, 4, 5)), 0)
    segments = jnp.asarray([[1, 1, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    gradient = jax.grad(lambda h: penalty(h, segments))(hidden)
    np.testing.assert_allclose(gradient, 0.5 * (hidden > 0) * (segments > 0)[None, ..., None] / 4, rtol=1e-6)


def test_microbatches_with_ragged_masks_add_up_to_the_large_batch():
    hidden = jax.random.normal(jax.random.key(0), (2, 4, 4, 5))
    segments = (jnp.arange(4)[None] < jnp.asarray([[4], [1], [0], [3]])).astype(jnp.int32)
    term = ScheduledL1((1.0,), (10,))
    whole = float(penalty(hidden, segments, 1.0))
    total = sum(
        float(penalty(hidden[:, rows], segments[rows], 1.0) * term.denominator({"segment_ids": segments[rows]}))
        for rows in (slice(0, 2), slice(2, 4))
    )
    np.testing.assert_allclose(total / term.denominator({"segment_ids": segments}), whole, rtol=1e-6)


def test_images_without_segments_take_the_mean_over_rows_of_each_layer():
    term = ScheduledL1((1.0,), (10,))
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    found = jax.vmap(lambda h: term.probes()[0].measure(h, Context()))(hidden)
    batch = {"weights": jnp.ones(3), "labels": jnp.zeros(3, jnp.int32)}
    got = term.numerator(None, batch, {"mlp.hidden": found}, 0) / term.denominator(batch)
    np.testing.assert_allclose(got, jnp.abs(hidden).sum(-1).mean((1, 2)).sum(), rtol=1e-6)


def test_the_sites_of_an_encoder_decoder_and_of_shared_experts_are_included():
    term = ScheduledL1((1.0,), (10,))
    one = {"l1": Stat(jnp.asarray([2.0])), "rows": Stat(jnp.asarray([1.0]))}
    sites = ("encoder.mlp.hidden", "decoder.mlp.hidden", "shared.mlp.hidden", "attn.hidden")
    batch = {"segment_ids": jnp.ones((1, 1), jnp.int32)}
    assert float(term.numerator(None, batch, dict.fromkeys(sites, one), 0)) == 6


def test_a_site_that_nothing_measures_is_refused_by_name():
    with pytest.raises(plugs.ConfigError, match="'l1' found no tensor at site = 'mlp.hiden'"):
        ScheduledL1((1.0,), (10,), "mlp.hiden").numerator(None, {}, {"mlp.hidden": {}}, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l1", "needs weights, ends"),
        ("l1:weights=0/1e-3,ends=50", "must be as many as the weights, 2"),
        ("l1:weights=0/1e-3,ends=50/50", "must be positive and increasing"),
        ("l1:weights=0/-1,ends=50/60", "must be finite and not negative"),
    ],
)
def test_impossible_schedules_are_refused(text, message):
    with pytest.raises(plugs.ConfigError, match=message):
        plugs.resolve("objective", text, "objectives[1]")


def test_the_spec_string_of_a_config_gives_the_schedule():
    spec = plugs.resolve("objective", "l1:weights=0/1e-3/5e-3,ends=50/100/200")
    assert spec == ScheduledL1((0.0, 1e-3, 5e-3), (50, 100, 200))
    assert all(a < b for a, b in itertools.pairwise(spec.ends))
