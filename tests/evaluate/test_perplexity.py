"""Perplexity by the protocol: what a window is, and every number against a slow float64 account of it."""

import dataclasses
import math

import numpy as np
import pytest

from sparsejax.data.tokenizers import LibraryCodec, train_bpe
from sparsejax.evaluate.perplexity import cut_windows, paired_difference, perplexity
from sparsejax.evaluate.scoring import Scorer
from sparsejax.plugs import ConfigError
from tests.evaluate.tiny_model import random_model, slow_log_probabilities, tokenizer

TEXT = "".join(chr(97 + (7 * i * i + i // 3) % 26) + "é " * (i % 5 == 0) for i in range(90))


@pytest.fixture(scope="module")
def model():
    return random_model()


def test_windows_do_not_overlap_the_tail_is_dropped_and_none_has_a_bos():
    ids = tokenizer().encode(TEXT)
    found = cut_windows(TEXT, tokenizer(), 16, 0, "t")
    assert found.total == len(found.tokens) == len(ids) // 16
    assert (found.tokens.ravel() == ids[: 16 * found.total]).all()
    first = cut_windows(TEXT, tokenizer(), 16, 3, "t")
    assert first.total == found.total and (first.tokens == found.tokens[:3]).all()
    assert len(cut_windows(TEXT, tokenizer(), 16, 10_000, "t").tokens) == found.total


def test_the_tokenizers_own_specials_stand_once_before_the_text():
    from tokenizers import processors

    library = train_bpe([TEXT], 270)
    library.add_special_tokens(["<s>"])
    bos = library.token_to_id("<s>")
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    reader = dataclasses.replace(tokenizer(), codec=LibraryCodec(library))
    tokens = cut_windows(TEXT, reader, 8, 0, "t").tokens.ravel()
    assert tokens[0] == bos and (tokens[1:] == reader.encode(TEXT)[: len(tokens) - 1]).all() and (tokens[1:] != bos).all()


def test_a_text_shorter_than_one_window_is_refused():
    with pytest.raises(ConfigError, match="--data = 'wiki': has 5 tokens, less than one window"):
        cut_windows("abcde", tokenizer(), 6, 0, "wiki")


def test_every_number_is_what_the_protocol_says(model):
    reader = dataclasses.replace(tokenizer(), token_bytes=np.arange(264) % 4)  # bytes per token that differ
    windows = cut_windows(TEXT, reader, 20, 5, "t")
    found = perplexity(Scorer(model, batch=2), windows, reader.token_bytes)
    losses, nats, num_bytes = [], [], []
    for row in windows.tokens:
        nll = -slow_log_probabilities(model, row)[np.arange(19), row[1:]]
        losses.append(nll.mean())
        nats.append(nll.sum())
        num_bytes.append((row[1:] % 4).sum())
    losses, nats, num_bytes = map(np.array, (losses, nats, num_bytes))
    error = losses.std(ddof=1) / math.sqrt(5)
    np.testing.assert_allclose(found.window_losses, losses, rtol=1e-5)
    np.testing.assert_allclose(
        [found.loss, found.loss_error, found.perplexity, found.perplexity_error],
        [losses.mean(), error, np.exp(losses.mean()), np.exp(losses.mean()) * error],
        rtol=1e-4,
    )
    assert found.tokens == 5 * 19 and found.bytes == num_bytes.sum()
    np.testing.assert_allclose(found.bits_per_byte, nats.sum() / math.log(2) / num_bytes.sum(), rtol=1e-5)
    jackknife = [(nats.sum() - n) / (num_bytes.sum() - b) / math.log(2) for n, b in zip(nats, num_bytes, strict=True)]
    expected = math.sqrt(4 / 5 * np.sum(np.square(jackknife - np.mean(jackknife))))
    np.testing.assert_allclose(found.bits_per_byte_error, expected, rtol=0.25)


def test_a_single_window_has_no_standard_error(model):
    reader = tokenizer()
    found = perplexity(Scorer(model), cut_windows(TEXT, reader, 20, 1, "t"), reader.token_bytes)
    assert math.isfinite(found.perplexity) and math.isnan(found.loss_error) and math.isnan(found.bits_per_byte_error)


def test_a_paired_difference_is_blind_to_what_both_share():
    rng = np.random.default_rng(0)
    shared, ours = rng.normal(size=400) * 10, 0.05 + 0.01 * rng.normal(size=400)
    found = paired_difference(shared + ours, shared)
    assert abs(found.mean - 0.05) < 4 * found.error and 0.0003 < found.error < 0.0008
    assert math.isnan(paired_difference(np.ones(1), np.zeros(1)).error)
