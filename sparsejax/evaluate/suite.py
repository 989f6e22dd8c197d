"""A model on several texts and tasks, beside a baseline on the very same windows and rows.

What can be refused is refused before the first forward pass: `open_data` reads and checks every file, `evaluate` then checks
the models against them and tokenizes everything before it scores anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejax.data.tokenizers import Tokenizer
from sparsejax.evaluate.perplexity import PERPLEXITY_WINDOW, Windows, cut_windows, paired_difference, perplexity
from sparsejax.evaluate.progress import Advance, progress_bar
from sparsejax.evaluate.scoring import Scorer
from sparsejax.evaluate.tasks import TASKS, EncodedTask, Task, encode_task, open_task, score_task
from sparsejax.evaluate.texts import TEXTS, EvaluationText, open_text, split_specs
from sparsejax.io.model import Model
from sparsejax.plugs import ConfigError, check, check_choice

Source = EvaluationText | Task
Progress = Callable[[str, int], AbstractContextManager[Advance]]


class _Scored(NamedTuple):
    """The numbers of one source, and the value of every window or row, for pairs."""

    numbers: dict[str, Any]
    values: np.ndarray


def open_data(given: Sequence[str], directories: Sequence[Path]) -> list[Source]:
    """The texts and tasks that `--data` names, read and checked.

    Args:
      given: entries `NAME` or `NAME:PATH`, several to a string separated by commas.
      directories: data folders, see `data.sources.data_directories`.
    Raises:
      ConfigError: an unknown name, or a file that is missing, empty or broken.
    """
    specs = split_specs(given)
    for name, _ in specs:
        check_choice("--data", name, (*TEXTS, *TASKS))
    return [(open_text if name in TEXTS else open_task)(name, argument, directories) for name, argument in specs]


def evaluate(
    model: Model,
    sources: Sequence[Source],
    *,
    baseline: Model | None = None,
    window: int = PERPLEXITY_WINDOW,
    limit: int = 0,
    batch: int = 0,
    progress: Progress = progress_bar,
) -> list[dict[str, Any]]:
    """One record of plain values per source: its protocol (what exactly was scored) and its numbers.

    Args:
      model: a causal language model with its tokenizer.
      baseline: scored on the same windows and rows; records then hold its numbers and the mean paired difference.
      window: tokens per window of a text.
      limit: windows of a text, or rows of a task; 0: all.
      batch: windows or rows per forward pass; 0: chosen by length and device.
      progress: (what is scored, its tokens) -> context manager of a function that takes the tokens just finished.
    Raises:
      ConfigError: a model that is not a language model or has no tokenizer, a window that the model or a text is too short for,
        a baseline whose tokenizer differs where texts are to be compared.
    """
    check(window >= 2, "--window", window, "must be at least 2: one token is given, the next is predicted")
    check(limit >= 0, "--limit", limit, "must be 0 (all) or more")
    models = [model] if baseline is None else [model, baseline]
    scorers = [Scorer(one, batch) for one in models]
    tokenizers = [_tokenizer_of(one) for one in models]
    if any(isinstance(source, EvaluationText) for source in sources):
        for scorer in scorers:
            _check_window(scorer, window)
        _check_same_tokenizer(models, tokenizers)
    encoded = [[_encode(source, scorer, window, limit) for scorer in scorers] for source in sources]
    return [_record(source, pieces, scorers, progress) for source, pieces in zip(sources, encoded, strict=True)]


def _tokenizer_of(model: Model) -> Tokenizer:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError(f"--model = {model.name!r}: has no tokenizer, so that no text can be put to it")
    return tokenizer


def _check_window(scorer: Scorer, window: int) -> None:
    check(window <= scorer.max_length, "--window", window, f"{scorer.model.name} has {scorer.max_length} positions; "
          f"give --window={scorer.max_length} or less")


def _check_same_tokenizer(models: list[Model], tokenizers: list[Tokenizer]) -> None:
    check(len({tokenizer.fingerprint for tokenizer in tokenizers}) == 1, "--baseline", models[-1].name,
          f"its tokenizer differs from that of {models[0].name}: windows of other tokens cannot be paired; evaluate it by "
          "itself and compare bits per byte")


def _encode(source: Source, scorer: Scorer, window: int, limit: int) -> Windows | EncodedTask:
    tokenizer = _tokenizer_of(scorer.model)
    encoded: Windows | EncodedTask
    if isinstance(source, EvaluationText):
        encoded = cut_windows(source.text, tokenizer, window, limit, source.name)
        highest = int(encoded.tokens.max())
    else:
        encoded = encode_task(source, tokenizer, scorer.max_length, limit)
        highest = max(int(row.tokens.max()) for row in encoded.rows)
    check(highest < scorer.model.config.vocab_size, "--model", scorer.model.name,
          f"its tokenizer gives id {highest} for {source.name}, its embedding has {scorer.model.config.vocab_size} rows")
    return encoded


def _record(
    source: Source, pieces: Sequence[Windows | EncodedTask], scorers: Sequence[Scorer], progress: Progress
) -> dict[str, Any]:
    start = time.perf_counter()
    found = []
    for encoded, scorer in zip(pieces, scorers, strict=True):
        title = f"{source.name} {scorer.model.name}" if len(scorers) > 1 else source.name
        with progress(title, _tokens_of(encoded)) as advance:
            found.append(_score(scorer, encoded, advance))
    record = {**_protocol(source, pieces[0]), **found[0].numbers, "seconds": time.perf_counter() - start}
    if len(found) > 1:
        difference = paired_difference(found[0].values, found[1].values)
        what = "loss" if isinstance(source, EvaluationText) else "acc"
        paired = {f"{what}_difference": difference.mean, f"{what}_difference_error": difference.error}
        record["baseline"] = {**found[1].numbers, **paired}
    return record


def _tokens_of(encoded: Windows | EncodedTask) -> int:
    return encoded.tokens.size if isinstance(encoded, Windows) else sum(len(row.tokens) for row in encoded.rows)


def _score(scorer: Scorer, encoded: Windows | EncodedTask, advance: Advance) -> _Scored:
    if isinstance(encoded, Windows):
        found = perplexity(scorer, encoded, _tokenizer_of(scorer.model).token_bytes, advance)
        numbers = found._asdict()
        return _Scored(numbers, numbers.pop("window_losses"))
    result = score_task(scorer, encoded, advance)
    return _Scored({**result.numbers, "truncated": encoded.truncated}, result.correct)


def _protocol(source: Source, encoded: Windows | EncodedTask) -> dict[str, Any]:
    """What was scored, so that another run can be told to be the same."""
    shared = {"data": source.name, "path": source.path, "sha256": source.sha256}
    if isinstance(source, EvaluationText):
        assert isinstance(encoded, Windows)
        count, window = encoded.tokens.shape
        cut = {"window": window, "windows": count, "windows_total": encoded.total}
        return {**shared, "kind": "perplexity", "rule": source.rule, **cut}
    assert isinstance(encoded, EncodedTask)
    counts = {"rows": len(encoded.questions), "rows_total": len(source.rows)}
    return {**shared, "kind": source.shape, **counts}
