"""Counting baselines against a slow loop over the definition."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.evaluate.ngram import ngram_baselines
from sparsejax.plugs import ConfigError

documents = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=30), min_size=1, max_size=5)


def oracle(train, held_out, vocab_size):
    """Bits of both models, token by token, straight from the module's equations."""
    count = Counter(t for d in train for t in d)
    pairs = Counter(p for d in train for p in zip(d, d[1:], strict=False))
    starts = Counter()
    followers = Counter()
    for (a, _), n in pairs.items():
        starts[a] += n
        followers[a] += 1
    unigram = lambda b: (count[b] + 1) / (sum(count.values()) + vocab_size)  # noqa: E731
    uni_bits = bi_bits = 0.0
    for document in held_out:
        for previous, b in zip([None, *document], document, strict=False):
            uni_bits -= math.log2(unigram(b))
            p = unigram(b)
            if starts[previous]:
                p = (pairs[previous, b] + followers[previous] * p) / (starts[previous] + followers[previous])
            bi_bits -= math.log2(p)
    return uni_bits, bi_bits


@settings(max_examples=60, deadline=None)
@given(documents, documents)
def test_both_models_equal_their_equations_evaluated_token_by_token(train, held_out):
    unigram, bigram = oracle(train, held_out, 6)
    result = ngram_baselines([np.array(d) for d in train], [np.array(d) for d in held_out], 6)
    assert result.tokens == sum(map(len, held_out))
    np.testing.assert_allclose([result.unigram, result.bigram], [unigram / result.tokens, bigram / result.tokens], rtol=1e-12)


def test_the_bigram_probabilities_of_each_context_sum_to_one():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 7, 40)
    for a in range(8):
        # The bits of the pair (a, b) less those of a alone give p(b | a).
        spent = lambda tokens: ngram_baselines(train, np.array(tokens), 8).bigram * len(tokens)  # noqa: E731
        total = sum(2 ** (spent([a]) - spent([a, b])) for b in range(8))
        assert total == pytest.approx(1, rel=1e-12)


def test_uniform_bytes_cost_eight_bits_and_an_alternating_text_almost_none():
    rng = np.random.default_rng(1)
    uniform = ngram_baselines(rng.integers(0, 256, 400_000), rng.integers(0, 256, 200_000), 256)
    assert uniform.entropy == pytest.approx(8, abs=0.01) and uniform.unigram == pytest.approx(8, abs=0.01)
    alternating = ngram_baselines(np.tile([1, 2], 5000), np.tile([1, 2], 500), 256)
    assert alternating.unigram == pytest.approx(1, abs=0.05) and alternating.bigram < 0.01


def test_no_unigram_model_beats_the_held_out_entropy():
    rng = np.random.default_rng(2)
    result = ngram_baselines(rng.integers(0, 20, 1000), rng.integers(0, 10, 1000), 32)
    assert result.entropy <= result.unigram


def test_bits_are_per_byte_of_text_not_per_token():
    tokens = np.arange(10) % 3
    per_token, per_byte = ngram_baselines(tokens, tokens, 3), ngram_baselines(tokens, tokens, 3, held_out_bytes=40)
    np.testing.assert_allclose(np.array(per_token[:3]) / 4, per_byte[:3])


def test_unusable_texts_are_refused_by_name():
    good = np.array([0, 1])
    with pytest.raises(ConfigError, match="training text is empty"):
        ngram_baselines([], good, 2)
    with pytest.raises(ConfigError, match=r"held-out text = \(0, 2\): must lie in 0 .. 1"):
        ngram_baselines(good, np.array([0, 2]), 2)
