"""Packing: each token is a target once per epoch, and nothing crosses from one document into another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.data.packing import PackedRows, SampledRows, TokenStore
from sparsejax.plugs import ConfigError

EOS, BOS, VOCAB = 90_000, 90_001, 90_002


def documents_of(lengths):
    """Documents whose tokens tell document and place: 1000 * document + place."""
    return [1000 * d + np.arange(n) for d, n in enumerate(lengths)]


def rows_of(lengths, length, packing=True):
    return PackedRows(TokenStore.build(documents_of(lengths), EOS, VOCAB), length, packing, BOS)


shapes = st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), st.integers(1, 17), st.booleans())


@given(shapes, st.integers(0, 5), st.integers(0, 3))
def test_each_token_is_a_target_exactly_once_per_epoch(shape, seed, epoch):
    lengths, length, packing = shape
    rows = rows_of(lengths, length, packing)
    seen = [rows.row(seed, epoch * rows.rows_per_epoch + i).tokens for i in range(rows.rows_per_epoch)]
    tokens = np.concatenate(seen)
    expected = np.concatenate([d for d in documents_of(lengths) if len(d)])
    assert sorted(tokens[tokens != EOS]) == expected.tolist()
    assert (tokens == EOS).sum() == sum(n > 0 for n in lengths)


@given(shapes, st.integers(0, 5))
def test_a_segment_is_consecutive_tokens_of_one_document(shape, seed):
    lengths, length, packing = shape
    rows = rows_of(lengths, length, packing)
    for i in range(rows.rows_per_epoch):
        row = rows.row(seed, i)
        assert len(row.tokens) <= length and len(row.segments()) == row.segment_ids[-1]
        assert packing or row.segment_ids.max() == 1
        for number, (start, stop) in enumerate(row.segments(), 1):
            tokens, previous = row.tokens[start:stop], row.previous[start:stop]
            assert (row.segment_ids[start:stop] == number).all()
            assert row.positions[start:stop].tolist() == list(range(stop - start))
            assert (previous[1:] == tokens[:-1]).all()
            assert EOS not in tokens[:-1]
            document = set((tokens[tokens != EOS] // 1000).tolist()) | set((previous[previous < EOS] // 1000).tolist())
            assert len(document) <= 1
            assert (previous == BOS).sum() <= 1 and BOS not in previous[1:]


def test_the_first_token_of_a_document_is_predicted_from_bos_and_the_last_target_is_eos():
    row = rows_of([3], 8).row(0, 0)
    assert row.previous.tolist() == [BOS, 0, 1, 2]
    assert row.tokens.tolist() == [0, 1, 2, EOS]


def test_rows_are_full_but_for_the_last_of_an_epoch():
    rows = rows_of([7, 30, 2, 11], 10)
    sizes = sorted(len(rows.row(3, i).tokens) for i in range(rows.rows_per_epoch))
    assert rows.rows_per_epoch == 6 and sizes == [4, 10, 10, 10, 10, 10]


def test_epochs_and_seeds_differ_in_order():
    rows = rows_of([5] * 40, 6)
    first = [[tuple(rows.row(seed, epoch * 40 + i).tokens) for i in range(40)] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert first[0] != first[1] != first[2] != first[0]


def test_a_row_is_the_same_whatever_was_asked_before():
    a, b = rows_of([9, 4, 23], 5), rows_of([9, 4, 23], 5)
    for index in (100, 3, 57, 0):
        b.row(7, index + 1)
        assert (a.row(7, index).tokens == b.row(7, index).tokens).all()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 17), st.booleans(), st.integers(0, 100))
def test_sampled_rows_hold_windows_of_single_documents(lengths, length, packing, index):
    documents = [np.append(d, EOS) for d in documents_of(lengths)]
    rows = SampledRows(len(documents), documents.__getitem__, length, packing, BOS)
    row = rows.row(1, index)
    assert len(row.tokens) == length if packing else row.segment_ids.max() == 1
    for start, stop in row.segments():
        tokens, before = row.tokens[start:stop], int(row.previous[start])
        document = (tokens[0] if tokens[0] != EOS else before) // 1000
        place = 0 if before == BOS else before % 1000 + 1
        assert (documents[document][place:place + stop - start] == tokens).all()
    assert (rows.row(1, index).tokens == row.tokens).all()


def test_a_corpus_of_empty_documents_is_refused_and_not_searched_for_ever():
    rows = SampledRows(3, lambda _: np.array([EOS]), 4, True, BOS)
    with pytest.raises(ConfigError, match="1000 documents"):
        rows.row(0, 0)
