"""Calibration: which tokens a method is fitted to, and that they are not those it is judged by."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.data.tokenizers import Tokenizer
from sparsejax.evaluate.texts import TEXTS, open_text
from sparsejax.plugs import ConfigError, check

SHINGLE = 64
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_HASHED_AT_ONCE = 2**20  # tokens


@dataclass(frozen=True)
class CalibrationSpec:
    """Which tokens.

    Fields:
      source: a text of `evaluate.texts` with its split, e.g. `stdlib:calibration` or `text:PATH`; several with commas between,
        which then take turns.
      sequences, length: how many windows of how many tokens, of all texts together.
      seed: which windows of the text, without replacement.
      skip_first: leading tokens of each window that statistics leave out (attention sinks).
    """

    source: str = "stdlib:calibration"
    sequences: int = 16
    length: int = 512
    seed: int = 0
    skip_first: int = 0

    @property
    def texts(self) -> list[str]:
        """Each text; a comma that no name of a text follows belongs to a path."""
        return re.split(rf", *(?=(?:{'|'.join(TEXTS)})(?::|,|$))", self.source)


@dataclass(frozen=True)
class Calibration:
    """Calibration tokens: int32[sequences, length], and what they were drawn from (hashes with commas between)."""

    spec: CalibrationSpec
    tokens: np.ndarray
    text_sha256: str

    @cached_property
    def sha256(self) -> str:
        """Of the tokens: the calibration's identity in every report."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens, "<i4").tobytes()).hexdigest()

    @cached_property
    def shingles(self) -> np.ndarray:
        """uint64 hashes of the runs of 64 tokens that start at multiples of 64, sorted."""
        return np.unique(np.concatenate([rolling_hashes(row)[::SHINGLE] for row in self.tokens]))

    def describe(self) -> dict[str, Any]:
        """For reports."""
        return {**vars(self.spec), "tokens": int(self.tokens.size), "sha256": self.sha256, "text_sha256": self.text_sha256}


def calibrate(spec: CalibrationSpec, tokenizer: Tokenizer, directories: Sequence[Path]) -> Calibration:
    """Read and tokenize the text of a spec and draw its windows.

    Raises:
      ConfigError: an unknown source, a text that is too short, or numbers that make no calibration.
    """
    for name in ("sequences", "length"):
        check(getattr(spec, name) >= 1, f"calibration.{name}", getattr(spec, name), "must be at least 1")
    check(0 <= spec.skip_first < spec.length, "calibration.skip_first", spec.skip_first, f"must be 0 to {spec.length - 1}")
    names = spec.texts
    check(spec.sequences >= len(names), "calibration.sequences", spec.sequences, f"must be at least the {len(names)} texts")
    parts, hashes = [], []
    for number, name in enumerate(names):
        windows, text_sha256 = _windows(name, len(range(number, spec.sequences, len(names))), spec, tokenizer, directories)
        parts.append(windows)
        hashes.append(text_sha256)
    turns = [part[row] for row in range(len(parts[0])) for part in parts if row < len(part)]
    return Calibration(spec, np.stack(turns), ",".join(hashes))


def _windows(
    source: str, count: int, spec: CalibrationSpec, tokenizer: Tokenizer, directories: Sequence[Path]
) -> tuple[np.ndarray, str]:
    """(int32[count, length] of one text, its hash)."""
    name, _, argument = source.partition(":")
    text = open_text(name, argument, directories)
    ids = np.asarray(tokenizer.encode(text.text), np.int32)
    whole = len(ids) // spec.length
    check(whole >= count, "calibration.sequences", count, f"{text.name} has {whole} windows of {spec.length} tokens")
    chosen = np.sort(np.random.default_rng(spec.seed).choice(whole, count, replace=False))
    return ids[: whole * spec.length].reshape(whole, spec.length)[chosen], text.sha256


def rolling_hashes(tokens: np.ndarray) -> np.ndarray:
    """uint64 hash of the 64 tokens from each offset of the last axis on; empty where there are fewer."""
    count = max(0, tokens.shape[-1] - SHINGLE + 1)
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * _FACTOR
    total = np.zeros((*tokens.shape[:-1], count), np.uint64)
    for offset in range(SHINGLE if count else 0):
        total = total * np.uint64(1099511628211) + mixed[..., offset : offset + count]
    return total


def check_disjoint(shingles: np.ndarray, evaluated: Sequence[np.ndarray], name: str) -> None:
    """Refuse an evaluation that shares 64 consecutive tokens with a calibration.

    Args:
      shingles: `Calibration.shingles`.
      evaluated: the tokens of each window or row of the evaluation.
      name: of the evaluated text.
    Raises:
      ConfigError: with the number of windows concerned.
    """
    lengths = np.array([len(window) for window in evaluated])
    hits = 0
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        for part in np.array_split(chosen, -(-len(chosen) * int(length) // _HASHED_AT_ONCE)):
            hashes = rolling_hashes(np.stack([evaluated[int(i)] for i in part]))
            hits += int(np.isin(hashes, shingles).any(axis=-1).sum())
    if hits:
        raise ConfigError(f"calibration overlaps evaluation: {hits} of {len(evaluated)} windows of {name} hold 64 tokens in a "
                          "row that were calibrated on; choose another split, or --allow-overlap")
