"""What a model is asked to predict: causal and prefix LM, denoising, masked LM, classification.

A task turns a packed row of tokens into one row of a batch. It is a pure function of the row and of a generator that is keyed
on (seed, index of the row). See `RowLayout` for the arrays of each model kind.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from sparsejax.data.denoising import MIXTURES, Denoiser, Mixture, budgeted_length, corrupt, most_spans, noise_mask
from sparsejax.data.packing import PackedRow
from sparsejax.data.tokenizers import Tokenizer
from sparsejax.plugs import check, check_choice, register

INT, FLOAT = np.dtype(np.int32), np.dtype(np.float32)
Row = dict[str, np.ndarray]
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]


class RowLayout(NamedTuple):
    """Lengths of a row: T of `tokens`, and S of `encoder_tokens`, 0 where no encoder stands beside a decoder."""

    length: int
    encoder_length: int = 0

    def shapes(self, prefix: bool = False) -> Shapes:
        """Name -> (shape of one row, dtype)."""
        shapes: Shapes = {name: ((self.length,), INT) for name in ("tokens", "targets", "segment_ids", "positions")}
        shapes["weights"] = ((self.length,), FLOAT)
        if prefix:
            shapes["prefix"] = ((self.length,), INT)
        if self.encoder_length:
            shapes |= {f"encoder_{n}": ((self.encoder_length,), INT) for n in ("tokens", "segment_ids", "positions")}
        return shapes


class TextTask(abc.ABC):
    """What the tasks on text share; a task says which model kinds it trains."""

    content: ClassVar[tuple[str, ...]] = ("text",)
    model_kinds: ClassVar[tuple[str, ...]]

    def num_sentinels(self, length: int) -> int:
        """Sentinel ids that the tokenizer must have."""
        return 0

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:  # noqa: B027  (most need nothing)
        """Raise a ConfigError where the tokenizer lacks what the task needs."""

    def shapes(self, length: int, model_kind: str) -> Shapes:
        """Name -> (shape of one row, dtype)."""
        return RowLayout(length).shapes()

    @abc.abstractmethod
    def row(self, packed: PackedRow, random: np.random.Generator, tokenizer: Tokenizer, length: int, model_kind: str) -> Row:
        """One row of a batch."""


def _padded(values: np.ndarray, length: int, fill: int = 0) -> np.ndarray:
    padded = np.full(length, fill, values.dtype)
    padded[:len(values)] = values
    return padded


def _causal_row(packed: PackedRow, weights: np.ndarray, tokenizer: Tokenizer, length: int) -> Row:
    pad = tokenizer.pad_id
    return {"tokens": _padded(packed.previous, length, pad), "targets": _padded(packed.tokens, length, pad),
            "weights": _padded(weights, length), "segment_ids": _padded(packed.segment_ids, length),
            "positions": _padded(packed.positions, length)}


@register("task", "causal_lm")
@dataclass(frozen=True)
class CausalLM(TextTask):
    """Predict each token, the end of the document included, from those before it in its document."""

    content: ClassVar[tuple[str, ...]] = ("text", "symbols")
    model_kinds: ClassVar[tuple[str, ...]] = ("decoder",)

    def row(self, packed: PackedRow, random: np.random.Generator, tokenizer: Tokenizer, length: int, model_kind: str) -> Row:
        return _causal_row(packed, np.ones(len(packed.tokens), np.float32), tokenizer, length)


@register("task", "prefix_lm")
@dataclass(frozen=True)
class PrefixLM(TextTask):
    """Causal LM after a bidirectional prefix, whose length is uniform over each segment; no loss on what the prefix shows."""

    model_kinds: ClassVar[tuple[str, ...]] = ("decoder",)

    def shapes(self, length: int, model_kind: str) -> Shapes:
        return RowLayout(length).shapes(prefix=True)

    def row(self, packed: PackedRow, random: np.random.Generator, tokenizer: Tokenizer, length: int, model_kind: str) -> Row:
        weights, prefix = np.ones(len(packed.tokens), np.float32), np.zeros(len(packed.tokens), np.int32)
        for start, stop in packed.segments():
            border = start + int(random.integers(1, stop - start + 1))
            prefix[start:border] = 1
            weights[start:border - 1] = 0  # the last position of the prefix predicts the first token beyond it
        return _causal_row(packed, weights, tokenizer, length) | {"prefix": _padded(prefix, length)}


@register("task", "masked_lm")
@dataclass(frozen=True)
class MaskedLM(TextTask):
    """BERT's objective (Devlin et al., 2018, arXiv 1810.04805).

    A share `rate` of the tokens is predicted: of these 80 % are replaced by the mask, 10 % by a random token, 10 % are left.
    """

    rate: float = 0.15
    model_kinds: ClassVar[tuple[str, ...]] = ("encoder",)

    def __post_init__(self) -> None:
        check(0 < self.rate < 1, "data.task: masked_lm.rate", self.rate, "must lie strictly between 0 and 1")

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        check(tokenizer.mask_id is not None, "data.task", "masked_lm", "the tokenizer file has no mask token")

    def row(self, packed: PackedRow, random: np.random.Generator, tokenizer: Tokenizer, length: int, model_kind: str) -> Row:
        candidates = np.flatnonzero(packed.tokens != tokenizer.eos_id)
        count = min(max(1, round(len(candidates) * self.rate)), len(candidates))
        chosen = random.choice(candidates, count, replace=False)
        action = random.random(count)
        tokens, weights = packed.tokens.copy(), np.zeros(len(packed.tokens), np.float32)
        weights[chosen] = 1
        substitutes = random.integers(0, tokenizer.num_ordinary, count)
        assert tokenizer.mask_id is not None  # see check_tokenizer
        tokens[chosen] = np.where(action < 0.8, tokenizer.mask_id, np.where(action < 0.9, substitutes, tokens[chosen]))
        return _causal_row(packed, weights, tokenizer, length) | {"tokens": _padded(tokens, length, tokenizer.pad_id)}


class Segment(NamedTuple):
    """One corrupted document: encoder inputs (or the prefix of a decoder) and targets."""

    inputs: np.ndarray
    targets: np.ndarray


@register("task", "ul2")
@dataclass(frozen=True)
class UL2(TextTask):
    """UL2's mixture of denoisers; `mixture` is ul2, ul2r (continued training of a causal LM) or t5 (span corruption alone).

    Each document of a row is corrupted by its own denoiser, to what fits in the row; so nothing crosses documents.
    Decoder: [mode] inputs targets, bidirectional over [mode] inputs, loss from the last input on, where a next token exists.
    Encoder-decoder: encoder [mode] inputs EOS, decoder targets EOS after BOS; segment ids agree on both sides.
    """

    mixture: str = "ul2"
    model_kinds: ClassVar[tuple[str, ...]] = ("decoder", "encoder_decoder")

    def __post_init__(self) -> None:
        check_choice("data.task: ul2.mixture", self.mixture, MIXTURES)

    @property
    def denoisers(self) -> Mixture:
        """The mixture's settings."""
        return MIXTURES[self.mixture]

    def num_sentinels(self, length: int) -> int:
        return most_spans(self.denoisers, length)

    def layout(self, length: int, model_kind: str) -> RowLayout:
        """Rows of T = `length`; encoder-decoder: S = `length`, T what `length` raw tokens need at most, a multiple of 8."""
        check(length >= 16, "data.sequence_length", length, "ul2 needs at least 16")
        if model_kind != "encoder_decoder":
            return RowLayout(length)
        needed = max(sum(d.counts(length)) for d in self.denoisers.denoisers) + 1
        return RowLayout(min(-(-needed // 8) * 8, length), length)

    def shapes(self, length: int, model_kind: str) -> Shapes:
        return self.layout(length, model_kind).shapes(prefix=model_kind == "decoder")

    def row(self, packed: PackedRow, random: np.random.Generator, tokenizer: Tokenizer, length: int, model_kind: str) -> Row:
        layout = self.layout(length, model_kind)
        segments = self._segments(packed, random, tokenizer, layout)
        return (_encoder_decoder_row if layout.encoder_length else _decoder_row)(segments, tokenizer, layout)

    def _segments(self, packed: PackedRow, random: np.random.Generator, tokenizer: Tokenizer,
                  layout: RowLayout) -> list[Segment]:
        segments: list[Segment] = []
        left, encoder_left = layout
        for start, stop in packed.segments():
            denoiser = self.denoisers.draw(random)
            mode = self._mode(denoiser, tokenizer)
            if encoder_left:  # an end-of-sequence id on both sides
                rooms = (encoder_left - len(mode) - 1, left - 1, layout.length + layout.encoder_length)
            else:
                rooms = (left, left, left - len(mode))
            size = budgeted_length(denoiser, stop - start, *rooms)
            if not size:
                continue
            tokens = packed.tokens[start:start + size]
            inputs, targets = corrupt(tokens, noise_mask(size, denoiser, random), tokenizer.sentinel_ids)
            segments.append(Segment(np.concatenate([mode, inputs]), targets))
            if encoder_left:
                left, encoder_left = left - len(targets) - 1, encoder_left - len(mode) - len(inputs) - 1
            else:
                left -= len(mode) + len(inputs) + len(targets)
        return segments

    def _mode(self, denoiser: Denoiser, tokenizer: Tokenizer) -> np.ndarray:
        return np.array([tokenizer.mode_ids[denoiser.mode]] if self.denoisers.mode_tokens else [], np.int32)


def _fill(row: Row, start: int, segment: int, arrays: dict[str, np.ndarray], prefix: str = "") -> int:
    """Write one segment's arrays into a row from `start` on; returns where it stops."""
    size = len(arrays["tokens"])
    for name, values in arrays.items():
        row[prefix + name][start:start + size] = values
    row[f"{prefix}segment_ids"][start:start + size] = segment
    row[f"{prefix}positions"][start:start + size] = np.arange(size)
    return start + size


def _empty(shapes: Shapes, pad_id: int) -> Row:
    return {name: np.full(shape, pad_id if name.endswith(("tokens", "targets")) else 0, dtype)
            for name, (shape, dtype) in shapes.items()}


def _decoder_row(segments: list[Segment], tokenizer: Tokenizer, layout: RowLayout) -> Row:
    row, at = _empty(layout.shapes(prefix=True), tokenizer.pad_id), 0
    for number, (inputs, targets) in enumerate(segments, 1):
        tokens = np.concatenate([inputs, targets])
        place = np.arange(len(tokens))
        weights = (place >= len(inputs) - 1) & (place < len(tokens) - 1)
        at = _fill(row, at, number, {"tokens": tokens, "targets": np.append(tokens[1:], tokenizer.pad_id),
                                     "weights": weights, "prefix": place < len(inputs)})
    return row


def _encoder_decoder_row(segments: list[Segment], tokenizer: Tokenizer, layout: RowLayout) -> Row:
    row, at, encoder_at = _empty(layout.shapes(), tokenizer.pad_id), 0, 0
    for number, (inputs, targets) in enumerate(segments, 1):
        targets = np.append(targets, tokenizer.eos_id)
        encoder_at = _fill(row, encoder_at, number, {"tokens": np.append(inputs, tokenizer.eos_id)}, "encoder_")
        at = _fill(row, at, number, {"tokens": np.append(tokenizer.bos_id, targets[:-1]), "targets": targets,
                                     "weights": np.ones(len(targets))})
    return row


@register("task", "classification")
@dataclass(frozen=True)
class Classification:
    """Predict one label per example: of an image, or of a synthetic sequence that has one."""

    content: ClassVar[tuple[str, ...]] = ("images", "symbols")
    model_kinds: ClassVar[tuple[str, ...]] = ("vit", "encoder", "decoder")
