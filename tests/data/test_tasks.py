"""Tasks: what is predicted from what, that nothing which is shown is also scored, and that each document stays by itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.data.counter_random import generator
from sparsejax.data.denoising import reconstruct
from sparsejax.data.packing import packed_row
from sparsejax.data.tasks import UL2, CausalLM, MaskedLM, PrefixLM
from sparsejax.data.tokenizers import Bytes
from sparsejax.plugs import ConfigError, resolve

LENGTH = 96
TOKENIZER = Bytes().build(None, 40, ())
MODES = {v: k for k, v in TOKENIZER.mode_ids.items()}

segment_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=6)


def row_of(lengths, seed=0):
    """A packed row of random documents, at most LENGTH tokens."""
    random, pieces, room = generator(seed, "test"), [], LENGTH
    for length in lengths:
        tokens = random.integers(0, 256, min(length, room))
        if len(tokens):
            pieces.append((tokens, TOKENIZER.bos_id))
        room -= len(tokens)
    return packed_row(pieces)


def make(task, packed, kind="decoder", seed=0):
    row = task.row(packed, generator(seed, "task"), TOKENIZER, LENGTH, kind)
    shapes = task.shapes(LENGTH, kind)
    assert {k: (v.shape, v.dtype) for k, v in row.items()} == shapes
    return row


def segments_of(row, prefix=""):
    """Per segment: name -> its part of each array of that side."""
    names = [n for n in row if n.startswith("encoder_") == bool(prefix)]
    ids = row[prefix + "segment_ids"]
    return [{n.removeprefix(prefix): row[n][ids == i] for n in names} for i in range(1, ids.max() + 1)]


@given(segment_lengths)
def test_causal_lm_scores_every_token_of_a_row_and_no_padding(lengths):
    packed = row_of(lengths)
    row = make(CausalLM(), packed)
    assert (row["weights"] == (row["segment_ids"] > 0)).all() and row["weights"].sum() == len(packed.tokens)
    for segment in segments_of(row):
        assert (segment["tokens"][1:] == segment["targets"][:-1]).all() and segment["tokens"][0] == TOKENIZER.bos_id
    assert (row["tokens"][row["segment_ids"] == 0] == TOKENIZER.pad_id).all()


@given(segment_lengths, st.integers(0, 1000))
def test_prefix_lm_never_scores_a_token_that_the_prefix_shows(lengths, seed):
    for segment in segments_of(make(PrefixLM(), row_of(lengths), seed=seed)):
        shown = int(segment["prefix"].sum())
        assert shown >= 1 and (segment["prefix"][:shown] == 1).all()
        # Position i holds token i - 1 and predicts token i: the prefix shows tokens up to shown - 2.
        assert segment["weights"].tolist() == [0] * (shown - 1) + [1] * (len(segment["weights"]) - shown + 1)


def test_prefix_lengths_are_uniform_over_a_segment():
    packed = row_of([10])
    counts = np.bincount([int(make(PrefixLM(), packed, seed=s)["prefix"].sum()) for s in range(2000)], minlength=11)
    assert counts[0] == 0 and counts[1:] / 2000 == pytest.approx([0.1] * 10, abs=0.03)


@given(segment_lengths, st.integers(0, 1000))
def test_masked_lm_changes_only_what_it_scores(lengths, seed):
    packed = row_of(lengths)
    row = make(MaskedLM(), packed, "encoder", seed)
    scored = row["weights"] > 0
    assert scored.sum() == max(1, round(0.15 * len(packed.tokens)))
    assert (row["targets"][: len(packed.tokens)] == packed.tokens).all()
    assert (row["tokens"] == row["targets"])[~scored].all()


def test_masked_lm_masks_eight_tenths_replaces_one_and_keeps_one():
    packed, kinds = row_of([60, 36]), []
    for seed in range(300):
        row = make(MaskedLM(), packed, "encoder", seed)
        scored = row["weights"] > 0
        tokens, targets = row["tokens"][scored], row["targets"][scored]
        kinds += np.where(tokens == TOKENIZER.mask_id, 0, np.where(tokens == targets, 2, 1)).tolist()
    assert np.bincount(kinds) / len(kinds) == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_masked_lm_leaves_the_end_of_a_document_alone():
    packed = packed_row([(np.array([65, TOKENIZER.eos_id]), TOKENIZER.bos_id)])
    for seed in range(20):
        assert make(MaskedLM(), packed, "encoder", seed)["weights"].tolist()[:2] == [1, 0]


@given(segment_lengths, st.integers(0, 1000), st.sampled_from(["ul2", "ul2r", "t5"]))
def test_ul2_on_a_decoder_is_mode_inputs_targets_of_single_documents(lengths, seed, mixture):
    packed = row_of(lengths)
    row = make(UL2(mixture), packed, seed=seed)
    originals = [packed.tokens[a:b] for a, b in packed.segments() if b - a >= 2]
    for segment, original in zip(segments_of(row), originals, strict=False):
        tokens, shown = segment["tokens"], int(segment["prefix"].sum())
        if mixture != "t5":
            assert tokens[0] in MODES
        inputs, targets = tokens[int(mixture != "t5"):shown], tokens[shown:]
        restored = reconstruct(inputs, targets, TOKENIZER.sentinel_ids)
        assert (restored == original[: len(restored)]).all() and len(restored) >= 2
        assert (segment["targets"][:-1] == tokens[1:]).all()
        assert segment["weights"].tolist() == [0] * (shown - 1) + [1] * (len(tokens) - shown) + [0]
        assert segment["positions"].tolist() == list(range(len(tokens)))


@given(segment_lengths, st.integers(0, 1000), st.sampled_from(["ul2", "ul2r", "t5"]))
def test_ul2_on_an_encoder_decoder_keeps_segments_apart_on_both_sides(lengths, seed, mixture):
    packed = row_of(lengths)
    row = make(UL2(mixture), packed, "encoder_decoder", seed)
    encoder, decoder = segments_of(row, "encoder_"), segments_of(row)
    assert len(encoder) == len(decoder)
    originals = [packed.tokens[a:b] for a, b in packed.segments() if b - a >= 2]
    for source, target, original in zip(encoder, decoder, originals, strict=False):
        assert source["tokens"][-1] == target["targets"][-1] == TOKENIZER.eos_id and target["tokens"][0] == TOKENIZER.bos_id
        inputs = source["tokens"][int(mixture != "t5"):-1]
        restored = reconstruct(inputs, target["targets"][:-1], TOKENIZER.sentinel_ids)
        assert (restored == original[: len(restored)]).all()
        assert (target["tokens"][1:] == target["targets"][:-1]).all() and (target["weights"] == 1).all()


def test_ul2_draws_its_seven_denoisers_uniformly_and_writes_their_mode():
    packed = row_of([LENGTH])
    modes = [MODES[int(make(UL2(), packed, seed=s)["tokens"][0])] for s in range(1400)]
    shares = [modes.count(m) / 1400 for m in "RSX"]
    assert shares == pytest.approx([2 / 7, 1 / 7, 4 / 7], abs=0.05)


def test_ul2_fills_the_row_to_the_token_budget():
    packed = row_of([LENGTH])
    for seed in range(50):
        row = make(UL2(), packed, seed=seed)
        used = int((row["segment_ids"] > 0).sum())
        assert used >= LENGTH - 3  # one more raw token can cost itself and one span more


@pytest.mark.parametrize("mixture", ["ul2", "ul2r", "t5"])
def test_ul2_on_an_encoder_decoder_keeps_a_full_row_whole(mixture):
    task = UL2(mixture)
    packed = row_of([LENGTH])
    for seed in range(30):
        row = make(task, packed, "encoder_decoder", seed)
        scored = row["targets"][row["weights"] > 0]
        kept = row["encoder_tokens"][row["encoder_segment_ids"] > 0]
        ordinary = sum(int((side < 256).sum()) for side in (scored, kept))
        assert ordinary >= LENGTH - (2 if mixture == "ul2r" else 0)


def test_ul2_needs_a_row_that_can_hold_a_corrupted_text():
    with pytest.raises(ConfigError, match="data.sequence_length = 8"):
        UL2().shapes(8, "decoder")


@pytest.mark.parametrize(("spec", "message"), [("ul3", "Did you mean 'ul2'"), ("ul2:ul1", "ul2.mixture = 'ul1'"),
                                               ("masked_lm:1.5", "masked_lm.rate = 1.5"), ("causal_lm:2", "takes at most 0")])
def test_a_bad_task_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        resolve("task", spec)
