"""Perplexity of a text by one rule: non-overlapping windows, the mean over them, and its standard error.

The text is tokenized once, with what the tokenizer puts before a text by default, and cut into `len // W` windows of W tokens;
the tail is dropped and no window gets a BOS of its own. A window's loss is the mean cross-entropy (nats) of its W - 1 shifted
targets. `perplexity = exp(mean loss over windows)`. Bits per byte divides by the UTF-8 bytes of the targets instead of by their
number, which makes it comparable across tokenizers. Two models are compared window by window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sparsejax.data.tokenizers import Tokenizer
from sparsejax.evaluate.likelihood import summarise
from sparsejax.evaluate.scoring import Row, Scorer
from sparsejax.plugs import check

PERPLEXITY_WINDOW = 2048


class Windows(NamedTuple):
    """A tokenized text, cut.

    Fields:
      tokens: int32 [n, W], the windows that are scored.
      total: windows in the whole text.
    """

    tokens: np.ndarray
    total: int


class Perplexity(NamedTuple):
    """Result for one text; errors are standard errors with the window as the unit of sampling, nan for a single window."""

    loss: float  # nats per token, mean over windows
    loss_error: float
    perplexity: float
    perplexity_error: float  # perplexity * loss_error, by the delta method
    bits_per_byte: float
    bits_per_byte_error: float
    tokens: int  # targets scored
    bytes: int  # UTF-8 bytes of these
    window_losses: np.ndarray  # float64 [n]


class Difference(NamedTuple):
    """Mean of paired differences, ours minus the baseline's, and its standard error."""

    mean: float
    error: float


def cut_windows(text: str, tokenizer: Tokenizer, window: int, limit: int, name: str) -> Windows:
    """Tokenize a text and cut it.

    Args:
      window: W, tokens per window, at least 2.
      limit: score the first `limit` windows; 0: all.
      name: of the text, for messages.
    Raises:
      ConfigError: fewer tokens than one window.
    """
    tokens = np.concatenate([np.array(tokenizer.prefix_ids, np.int32), tokenizer.encode(text)])
    total = len(tokens) // window
    check(total, "--data", name, f"has {len(tokens):,} tokens, less than one window; give a shorter --window than {window}")
    kept = min(total, limit or total)
    return Windows(tokens[: kept * window].reshape(kept, window), total)


def perplexity(
    scorer: Scorer, windows: Windows, token_bytes: np.ndarray, advance: Callable[[int], None] = lambda tokens: None
) -> Perplexity:
    """Score every window.

    Args:
      token_bytes: UTF-8 bytes of each id, `Tokenizer.token_bytes`.
      advance: called with the number of tokens finished since the last call.
    """
    tokens = windows.tokens
    start = scorer.scope.first_scored(tokens.shape[1]) + 1
    targets = tokens.shape[1] - start
    check(targets > 0, "--scope", scorer.scope, f"leaves no target of a window of {tokens.shape[1]} tokens")
    nll = scorer.score([Row(row, start) for row in tokens], advance).nll
    num_bytes = token_bytes[tokens[:, start:]].sum(axis=1, dtype=np.float64)
    found = summarise({"nll": nll, "weight": np.full(len(nll), float(targets)), "bytes": num_bytes})
    return Perplexity(
        loss=found.loss,
        loss_error=found.loss_error,
        perplexity=found.perplexity,
        perplexity_error=found.perplexity * found.loss_error,
        bits_per_byte=found.bits_per_byte,
        bits_per_byte_error=found.bits_per_byte_error,
        tokens=len(nll) * targets,
        bytes=int(num_bytes.sum()),
        window_losses=nll / targets,
    )


def paired_difference(ours: np.ndarray, baseline: np.ndarray) -> Difference:
    """Of two models' values on the same windows or rows, float64 [n] each; the error is nan for a single one."""
    return Difference(*mean_and_error(np.asarray(ours, np.float64) - np.asarray(baseline, np.float64)))


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error, the sample deviation over sqrt(n)."""
    count = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return float(np.mean(values)), error
