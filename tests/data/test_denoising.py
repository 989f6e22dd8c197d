"""UL2's card: counts, spans, reconstruction, mode tokens and static shapes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.data.denoising import MIXTURES, Denoiser, budgeted_length, corrupt, most_spans, noise_mask, reconstruct

SENTINELS = np.arange(1000, 2000)
ALL = [d for name in ("ul2", "ul2r") for d in MIXTURES[name].denoisers]


def random_of(seed):
    return np.random.Generator(np.random.Philox(seed))


def runs(mask):
    """Lengths of the runs of true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return edges[1::2] - edges[::2]


@given(st.sampled_from(ALL), st.integers(2, 600), st.integers(0, 2**32))
def test_corruption_keeps_all_tokens_and_can_be_undone(denoiser, length, seed):
    random = random_of(seed)
    tokens = random.integers(0, 256, length)
    mask = noise_mask(length, denoiser, random)
    inputs, targets = corrupt(tokens, mask, SENTINELS)
    spans = len(runs(mask))
    assert len(inputs) + len(targets) == length + 2 * spans
    assert (inputs < 1000).sum() + (targets < 1000).sum() == length
    assert inputs[inputs >= 1000].tolist() == targets[targets >= 1000].tolist() == SENTINELS[:spans].tolist()
    assert (reconstruct(inputs, targets, SENTINELS) == tokens).all()


@given(st.sampled_from([d for d in ALL if d.rate]), st.integers(2, 600), st.integers(0, 2**32))
def test_the_numbers_of_noise_tokens_and_spans_do_not_depend_on_the_draw(denoiser, length, seed):
    mask = noise_mask(length, denoiser, random_of(seed))
    assert (int(mask.sum()), len(runs(mask))) == denoiser.counts(length)


@pytest.mark.parametrize("denoiser", MIXTURES["ul2"].denoisers, ids=str)
def test_masked_fraction_is_the_rate_within_one_percent(denoiser):
    masks = [noise_mask(512, denoiser, random_of(i)) for i in range(50)]
    assert np.mean(masks) == pytest.approx(denoiser.rate, abs=0.01)


SEVERAL_SPANS = [d for d in MIXTURES["ul2"].denoisers if d.mode != "S" and (d.mean_span, d.rate) != (64, 0.15)]


@pytest.mark.parametrize("denoiser", SEVERAL_SPANS, ids=str)
def test_mean_span_is_the_setting_within_five_percent(denoiser):
    lengths = np.concatenate([runs(noise_mask(512, denoiser, random_of(i))) for i in range(50)])
    assert lengths.mean() == pytest.approx(denoiser.mean_span, rel=0.05)


def test_spans_of_64_at_15_percent_of_512_are_one_span_of_77_at_any_place():
    masks = np.array([noise_mask(512, Denoiser("X", 64, 0.15), random_of(i)) for i in range(300)])
    assert all(runs(m).tolist() == [77] for m in masks)
    starts = masks.argmax(1)
    assert starts.min() < 30 and starts.max() > 405 and starts.mean() == pytest.approx((512 - 77) / 2, abs=25)


@pytest.mark.parametrize("length", [4, 63, 512])
def test_the_s_denoiser_of_ul2_is_one_span_of_a_quarter_that_ends_the_row(length):
    mask = noise_mask(length, Denoiser("S", 0, 0.25), random_of(0))
    assert runs(mask).tolist() == [round(length / 4)] and mask[-1]


def test_the_s_denoiser_of_ul2r_pivots_uniformly():
    lengths = [int(noise_mask(101, Denoiser("S", 0, 0), random_of(i)).sum()) for i in range(2000)]
    assert min(lengths) == 1 and max(lengths) == 100 and np.mean(lengths) == pytest.approx(50.5, abs=2)


def test_rows_of_several_spans_start_kept_and_end_in_noise():
    for seed in range(20):
        mask = noise_mask(100, Denoiser("X", 3, 0.5), random_of(seed))
        assert not mask[0] and mask[-1]


def test_span_lengths_are_a_uniform_random_composition():
    denoiser = Denoiser("X", 2, 0.5)  # of 8 tokens: 4 noise in 2 spans; compositions 1+3, 2+2, 3+1
    firsts = [runs(noise_mask(8, denoiser, random_of(i)))[0] for i in range(3000)]
    assert np.bincount(firsts, minlength=4)[1:] / 3000 == pytest.approx([1 / 3] * 3, abs=0.04)


def test_mixtures_are_the_published_ones():
    settings = {(d.mode, d.mean_span, d.rate) for d in MIXTURES["ul2"].denoisers}
    assert settings == {("R", 3, 0.15), ("R", 8, 0.15), ("S", 0, 0.25),
                        ("X", 3, 0.5), ("X", 8, 0.5), ("X", 64, 0.15), ("X", 64, 0.5)}
    assert MIXTURES["ul2"].probabilities == pytest.approx([1 / 7] * 7)
    draws = [MIXTURES["ul2r"].draw(random) for random in [random_of(3)] for _ in range(3000)]
    assert np.mean([d.mode == "S" for d in draws]) == pytest.approx(0.5, abs=0.03)


@given(st.sampled_from(ALL), st.integers(2, 300), st.integers(5, 300), st.integers(5, 300), st.integers(5, 300))
def test_the_budget_is_the_longest_that_fits(denoiser, available, inputs_room, targets_room, total_room):
    def fits(length):
        noise, spans = denoiser.counts(length)
        kept = length - noise if denoiser.rate else length - 1
        return kept + spans <= inputs_room and noise + spans <= targets_room and length + 2 * spans <= total_room

    expected = max((n for n in range(2, available + 1) if fits(n)), default=0)
    assert budgeted_length(denoiser, available, inputs_room, targets_room, total_room) == expected


@pytest.mark.parametrize("name", MIXTURES)
def test_no_shorter_text_needs_more_sentinels(name):
    assert most_spans(MIXTURES[name], 200) == max(d.counts(n)[1] for d in MIXTURES[name].denoisers for n in range(2, 201))
