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
from sparsejax.evaluate.scope import Scope
from sparsejax.evaluate.scoring import Scorer
from sparsejax.evaluate.tasks import TASKS, EncodedTask, Task, encode_task, open_task, score_task
from sparsejax.evaluate.texts import TEXTS, EvaluationText, open_text, split_specs
from sparsejax.io.model import Model
from sparsejax.plugs import ConfigError, check, check_choice

Source = EvaluationText | Task
Encoded = Windows | EncodedTask
Inspect = Callable[[str, Sequence[np.ndarray]], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]


class Scored(NamedTuple):
    """One source under one model: its protocol and numbers, and the value of every window (loss) or question (0 or 1)."""

    record: dict[str, Any]
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
    scope: Scope = Scope(),  # noqa: B008  (frozen)
    window: int = PERPLEXITY_WINDOW,
    limit: int = 0,
    batch: int = 0,
    inspect: Inspect | None = None,
    progress: Progress = progress_bar,
) -> list[dict[str, Any]]:
    """One record of plain values per source: its protocol (what exactly was scored) and its numbers.

    Args:
      model: a causal language model with its tokenizer.
      baseline: scored on the same windows and rows; records then hold its numbers and the mean paired difference.
      scope: at which tokens activation sparsity acts; for any but all, only targets predicted from there count.
      window: tokens per window of a text.
      limit: windows of a text, or rows of a task; 0: all.
      batch: windows or rows per forward pass; 0: chosen by length and device.
      inspect: called with each source's name and the tokens to be scored before any is, to refuse them.
      progress: (what is scored, its tokens) -> context manager of a function that takes the tokens just finished.
    Raises:
      ConfigError: a model that is not a language model or has no tokenizer, a window that the model or a text is too short for
        or that the scope leaves nothing of, a baseline whose tokenizer differs where texts are to be compared.
    """
    models = [model] if baseline is None else [model, baseline]
    scorers = [Scorer(one, batch, scope) for one in models]
    encoded = [encode(one, sources, window, limit, scope) for one in models]
    if any(isinstance(source, EvaluationText) for source in sources):
        _check_same_tokenizer(models)
    for source, piece in zip(sources, encoded[0], strict=True):
        if inspect is not None:
            inspect(source.name, tokens_of(piece))
    records = []
    for source, *pieces in zip(sources, *encoded, strict=True):
        found = []
        for scorer, piece in zip(scorers, pieces, strict=True):
            title = f"{source.name} {scorer.model.name}" if len(scorers) > 1 else source.name
            found.append(score(scorer, source, piece, title, progress))
        seconds = sum(one.record["seconds"] for one in found)
        beside = {"baseline": compared(*found)} if len(found) > 1 else {}
        records.append({**found[0].record, "seconds": seconds, **beside})
    return records


def encode(
    model: Model, sources: Sequence[Source], window: int, limit: int, scope: Scope = Scope()  # noqa: B008  (frozen)
) -> list[Encoded]:
    """The windows of each text and the rows of each task, as `evaluate` takes them.

    Raises:
      ConfigError: as `evaluate`, for one model.
    """
    check(window >= 2, "--window", window, "must be at least 2: one token is given, the next is predicted")
    check(limit >= 0, "--limit", limit, "must be 0 (all) or more")
    if any(isinstance(source, EvaluationText) for source in sources):
        longest = model.config.max_length
        check(window <= longest, "--window", window, f"{model.name} has {longest} positions; give --window={longest} or less")
        left = window - 1 - scope.first_scored(window)
        check(left > 0, "--scope", scope.tokens, f"with --keep-first={scope.keep_first} leaves no target of {window} tokens")
    return [_encode(source, model, window, limit) for source in sources]


def tokens_of(encoded: Encoded) -> list[np.ndarray]:
    """The tokens of each window or row."""
    return list(encoded.tokens) if isinstance(encoded, Windows) else [row.tokens for row in encoded.rows]


def score(
    scorer: Scorer, source: Source, encoded: Encoded, title: str = "", progress: Progress = progress_bar
) -> Scored:
    """Score one source; the record also has the seconds that it took."""
    start = time.perf_counter()
    with progress(title or source.name, sum(map(len, tokens_of(encoded)))) as advance:
        numbers, values = _numbers(scorer, encoded, advance)
    record = {**protocol(source, encoded, scorer.scope), **numbers, "seconds": time.perf_counter() - start}
    return Scored(record, values)


def compared(ours: Scored, baseline: Scored) -> dict[str, Any]:
    """The baseline's numbers with the mean paired difference, ours minus its, and that one's standard error."""
    difference = paired_difference(ours.values, baseline.values)
    what = "loss" if baseline.record["kind"] == "perplexity" else "acc"
    numbers = {name: value for name, value in baseline.record.items() if name not in (*PROTOCOL, "seconds")}
    return {**numbers, f"{what}_difference": difference.mean, f"{what}_difference_error": difference.error}


def _tokenizer_of(model: Model) -> Tokenizer:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError(f"--model = {model.name!r}: has no tokenizer, so that no text can be put to it")
    return tokenizer


def _check_same_tokenizer(models: list[Model]) -> None:
    check(len({_tokenizer_of(one).fingerprint for one in models}) == 1, "--baseline", models[-1].name,
          f"its tokenizer differs from that of {models[0].name}: windows of other tokens cannot be paired; evaluate it by "
          "itself and compare bits per byte")


def _encode(source: Source, model: Model, window: int, limit: int) -> Encoded:
    tokenizer = _tokenizer_of(model)
    encoded: Encoded
    if isinstance(source, EvaluationText):
        encoded = cut_windows(source.text, tokenizer, window, limit, source.name)
    else:
        encoded = encode_task(source, tokenizer, model.config.max_length, limit)
    highest = max(int(tokens.max()) for tokens in tokens_of(encoded))
    check(highest < model.config.vocab_size, "--model", model.name,
          f"its tokenizer gives id {highest} for {source.name}, its embedding has {model.config.vocab_size} rows")
    return encoded


def _numbers(scorer: Scorer, encoded: Encoded, advance: Advance) -> tuple[dict[str, Any], np.ndarray]:
    """(the numbers of a source, the value of every window or question)."""
    if isinstance(encoded, Windows):
        numbers = perplexity(scorer, encoded, _tokenizer_of(scorer.model).token_bytes, advance)._asdict()
        return numbers, numbers.pop("window_losses")
    result = score_task(scorer, encoded, advance)
    return {**result.numbers, "truncated": encoded.truncated}, result.correct


PROTOCOL = (
    "data", "path", "sha256", "kind", "rule", "window", "windows", "windows_total", "rows", "rows_total", "scope", "keep_first",
)


def protocol(source: Source, encoded: Encoded, scope: Scope) -> dict[str, Any]:
    """What is scored (keys of `PROTOCOL`), so that another run can be told to be the same."""
    shared: dict[str, Any] = {"data": source.name, "path": source.path, "sha256": source.sha256}
    shared |= {"scope": scope.tokens, "keep_first": scope.keep_first}
    if isinstance(source, EvaluationText):
        assert isinstance(encoded, Windows)
        count, window = encoded.tokens.shape
        cut = {"window": window, "windows": count, "windows_total": encoded.total}
        return {**shared, "kind": "perplexity", "rule": source.rule, **cut}
    assert isinstance(encoded, EncodedTask)
    counts = {"rows": len(encoded.questions), "rows_total": len(source.rows)}
    return {**shared, "kind": source.shape, **counts}
