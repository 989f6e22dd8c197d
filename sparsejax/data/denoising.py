"""Span corruption (T5, arXiv 1910.10683) and UL2's mixture of denoisers (Tay et al., 2022, arXiv 2205.05131).

A denoiser turns L tokens into `inputs` (kept tokens, one sentinel in place of each noise span) and `targets` (one sentinel in
place of each kept span, then the noise tokens that follow it). len(inputs) + len(targets) = L + 2 * spans; sentinel i is the
same on both sides.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Denoiser:
    """Settings of one denoiser.

    Attributes:
      mode: `R` regular, `S` sequential, `X` extreme; the mode token that starts its inputs.
      mean_span: mean length of a noise span in tokens (R and X).
      rate: share of the tokens that is noise; for S the share at the end that is the target, 0: uniformly random.
    """

    mode: str
    mean_span: float
    rate: float

    def counts(self, length: int) -> tuple[int, int]:
        """(noise tokens, noise spans) for `length` tokens; with a random suffix, its longest."""
        if self.mode == "S":
            noise = round(length * self.rate) if self.rate else length - 1
            return min(max(noise, 1), length - 1), 1
        noise = min(max(round(length * self.rate), 1), length - 1)
        return noise, min(max(1, round(noise / self.mean_span)), noise, length - noise)


@dataclass(frozen=True)
class Mixture:
    """Denoisers, the probability of each, and whether their inputs start with a mode token."""

    denoisers: tuple[Denoiser, ...]
    probabilities: tuple[float, ...]
    mode_tokens: bool = True

    def draw(self, random: np.random.Generator) -> Denoiser:
        """One denoiser."""
        return self.denoisers[bisect.bisect(list(itertools.accumulate(self.probabilities[:-1])), random.random())]


R3, R8 = Denoiser("R", 3, 0.15), Denoiser("R", 8, 0.15)
X_SETTINGS = ((3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5))
MIXTURES = {
    # Uniform over the seven; the S span of L / 4 tokens is the last quarter.
    "ul2": Mixture((R3, R8, Denoiser("S", 0, 0.25), *(Denoiser("X", m, r) for m, r in X_SETTINGS)), (1 / 7,) * 7),
    # Continued training of a causal LM (Tay et al., 2022, arXiv 2210.11399).
    "ul2r": Mixture((Denoiser("S", 0, 0), R3, Denoiser("X", 32, 0.15), Denoiser("X", 3, 0.5)), (1 / 2, 1 / 6, 1 / 6, 1 / 6)),
    "t5": Mixture((R3,), (1.0,), mode_tokens=False),
}


def noise_mask(length: int, denoiser: Denoiser, random: np.random.Generator) -> np.ndarray:
    """bool[length], true where a token is noise.

    Spans are random non-empty compositions of the noise and of the kept tokens, interleaved from a kept one on, so that the row
    ends in noise (T5). A single span of R or X would always be the tail, as in an S denoiser: its place is uniform instead.
    """
    noise, spans = denoiser.counts(length)
    if denoiser.mode == "S" and not denoiser.rate:
        noise = length - int(random.integers(1, length))
    if spans == 1:
        start = length - noise if denoiser.mode == "S" else int(random.integers(length - noise + 1))
        return (np.arange(length) >= start) & (np.arange(length) < start + noise)
    lengths = np.stack([_composition(length - noise, spans, random), _composition(noise, spans, random)], 1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _composition(total: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """`total` split into `parts` positive integers, uniformly over all ways."""
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupt(tokens: np.ndarray, mask: np.ndarray, sentinels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets) int32 of the tokens under a noise mask; `sentinels[i]` stands for the i-th noise span."""
    first = mask & ~np.concatenate([[False], mask[:-1]])
    marks = sentinels[:np.count_nonzero(first)]
    # Each sentinel replaces the first token of its span in the inputs, and precedes that token in the targets.
    marked = tokens.astype(np.int32)
    marked[first] = marks
    targets = np.insert(tokens[mask], np.flatnonzero(first[mask]), marks)
    return marked[~mask | first], targets.astype(np.int32)


def reconstruct(inputs: np.ndarray, targets: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """The original int32 tokens of `corrupt`'s two outputs, neither with mode or end tokens: the inverse of `corrupt`."""
    index = {int(s): i for i, s in enumerate(sentinels)}
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in targets.tolist():
        if token in index:
            current = spans.setdefault(index[token], [])
        else:
            current.append(token)
    original: list[int] = []
    for token in inputs.tolist():
        original += spans[index[token]] if token in index else [token]
    return np.array(original, np.int32)


def budgeted_length(denoiser: Denoiser, available: int, inputs_room: int, targets_room: int, total_room: int) -> int:
    """The greatest number L <= `available` of raw tokens whose corrupted form fits, or 0 when not even two do.

    This is T5's inputs-length formula: the row is filled to an exact token budget before the mask is drawn.

    Args:
      denoiser: what corrupts.
      available: tokens at hand.
      inputs_room, targets_room, total_room: most tokens of inputs (kept + spans), of targets (noise + spans), and of both.
    """
    def overflows(length: int) -> bool:
        noise, spans = denoiser.counts(length)
        # A random suffix may leave all but one token on either side.
        kept = length - 1 if denoiser.mode == "S" and not denoiser.rate else length - noise
        return kept + spans > inputs_room or noise + spans > targets_room or length + 2 * spans > total_room

    lengths = range(2, min(available, total_room) + 1)
    fitting = bisect.bisect_left(lengths, True, key=overflows)  # every count grows with the length
    return lengths[fitting - 1] if fitting else 0


def most_spans(mixture: Mixture, length: int) -> int:
    """The greatest number of spans that any denoiser of the mixture makes of up to `length` tokens."""
    return max(d.counts(length)[1] for d in mixture.denoisers)
