"""What counting alone achieves: unigram and bigram models of the training text, scored on held-out text in bits per byte.

They are the floor under a demo's claim to have learned something. Both are fitted on the training tokens and scored on the
held-out tokens, every one of them, with p > 0 everywhere:

  unigram  p(b) = (c(b) + 1) / (N + V)                                  add one (Laplace)
  bigram   p(b | a) = (c(a, b) + d(a) p(b)) / (c(a) + d(a))             Witten and Bell 1991, method C, interpolated

with c counts, N training tokens, V the vocabulary, c(a) the number of pairs that start with a, and d(a) how many different
tokens follow a. A token after an unseen a, and the first of each document, is scored by the unigram model. Witten-Bell has no
parameter to tune and is, on text, a stronger (so, a fairer) bigram than add-one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparsejax.plugs import ConfigError, check

Documents = np.ndarray | Sequence[np.ndarray]


class NgramBaselines(NamedTuple):
    """Held-out bits per byte of counting models, and the held-out text's own unigram entropy."""

    unigram: float  # cross-entropy of the unigram model that was fitted on the training text
    bigram: float
    entropy: float  # empirical entropy of the held-out tokens: the best that any unigram model can do there
    tokens: int  # held-out tokens scored
    bytes: int  # held-out bytes


def ngram_baselines(train: Documents, held_out: Documents, vocab_size: int, held_out_bytes: int = 0) -> NgramBaselines:
    """Fit both models on `train`, score them on `held_out`.

    Args:
      train: int[N] tokens, or a sequence of documents; pairs never cross a border between documents.
      held_out: likewise.
      vocab_size: V; tokens are 0 .. V - 1.
      held_out_bytes: UTF-8 bytes of the held-out text; 0: its number of tokens (byte tokens).
    Raises:
      ConfigError: no training or held-out tokens, or tokens outside the vocabulary.
    """
    fitted = _Counts.of(_checked(train, vocab_size, "training"), vocab_size)
    scored = _Counts.of(_checked(held_out, vocab_size, "held-out"), vocab_size)
    tokens = int(scored.tokens.sum())
    num_bytes = held_out_bytes or tokens
    log_unigram = np.log2((fitted.tokens + 1) / (fitted.tokens.sum() + vocab_size))
    frequency = scored.tokens[scored.tokens > 0] / tokens
    return NgramBaselines(
        unigram=float(-(scored.tokens @ log_unigram) / num_bytes),
        bigram=_bigram_bits(fitted, scored, log_unigram) / num_bytes,
        entropy=float(-(frequency @ np.log2(frequency)) * tokens / num_bytes),
        tokens=tokens,
        bytes=num_bytes,
    )


class _Counts(NamedTuple):
    tokens: np.ndarray  # [V]
    firsts: np.ndarray  # [V], of the tokens that open a document
    pairs: np.ndarray  # distinct pairs as a * V + b, sorted
    pair_counts: np.ndarray

    @classmethod
    def of(cls, documents: list[np.ndarray], vocab_size: int) -> _Counts:
        tokens = np.concatenate(documents)
        opens = np.zeros(len(tokens), bool)
        opens[np.cumsum([0] + [len(d) for d in documents[:-1]])] = True
        codes = tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
        pairs, pair_counts = np.unique(codes[~opens[1:]], return_counts=True)
        occurrences = np.bincount(tokens, minlength=vocab_size).astype(np.float64)
        firsts = np.bincount(tokens[opens], minlength=vocab_size).astype(np.float64)
        return cls(occurrences, firsts, pairs, pair_counts.astype(np.float64))


def _checked(documents: Documents, vocab_size: int, name: str) -> list[np.ndarray]:
    parts = [documents] if isinstance(documents, np.ndarray) else [np.asarray(d) for d in documents]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise ConfigError(f"the {name} text is empty: there is nothing to count")
    low, high = min(int(p.min()) for p in parts), max(int(p.max()) for p in parts)
    check(low >= 0 and high < vocab_size, f"tokens of the {name} text", (low, high), f"must lie in 0 .. {vocab_size - 1}")
    return parts


def _bigram_bits(fitted: _Counts, scored: _Counts, log_unigram: np.ndarray) -> float:
    """Bits that the Witten-Bell bigram spends on the scored counts."""
    vocab_size = len(log_unigram)
    first, second = np.divmod(scored.pairs, vocab_size)
    previous = fitted.pairs // vocab_size
    followed = np.bincount(previous, weights=fitted.pair_counts, minlength=vocab_size)
    distinct = np.bincount(previous, minlength=vocab_size).astype(np.float64)
    seen = _lookup(fitted.pairs, fitted.pair_counts, scored.pairs)
    unigram = np.exp2(log_unigram[second])
    known = followed[first] > 0
    total = np.where(known, followed[first] + distinct[first], 1.0)
    probability = np.where(known, (seen + distinct[first] * unigram) / total, unigram)
    return -math.fsum((scored.pair_counts * np.log2(probability)).tolist()) - float(scored.firsts @ log_unigram)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` at each wanted key of the sorted `keys`, 0 where it is missing."""
    if not len(keys):
        return np.zeros(len(wanted))
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0.0)
