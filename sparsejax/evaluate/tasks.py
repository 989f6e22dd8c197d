"""Multiple choice and cloze tasks from local JSONL, by the log-likelihood of a continuation given its context.

Three shapes of a row, told apart by their keys:

  {query, choices, gold}                  which choice is the likeliest after the query
  {context, continuation}                 is the continuation what greedy decoding gives (LAMBADA)
  {context_options, continuation, gold}   after which context is the continuation the likeliest (WinoGrande's partial scoring)

`acc` takes the largest summed log-likelihood; `acc_norm` divides it by the UTF-8 bytes of the choice first (lm-eval calls that
acc_bytes; its acc_norm divides by characters). A context stands as the file has it, with one blank before the continuation
where neither side has any: a cue such as "\nAnswer:", which lm-eval's own prompts have, belongs into the file. Both are
tokenized together, as lm-eval does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejax.data.sources import check_unicode, decode_utf8, find_file
from sparsejax.data.tokenizers import Tokenizer
from sparsejax.evaluate.perplexity import mean_and_error
from sparsejax.evaluate.scoring import Row, Scorer
from sparsejax.plugs import ConfigError, check, check_choice

# Names under which a file is looked up; `jsonl` is any other.
TASKS = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "copa",
    "hellaswag",
    "jsonl",
    "lambada",
    "openbookqa",
    "piqa",
    "winograd",
    "winogrande",
)
SHAPES = {
    "choices": ("query", "choices", "gold"),
    "cloze": ("context", "continuation"),
    "contexts": ("context_options", "continuation", "gold"),
}


@dataclass(frozen=True)
class TaskRow:
    """One question: (context, continuation) pairs, which of them is right, and where it stands, `file:line`."""

    pairs: tuple[tuple[str, str], ...]
    gold: int
    num_bytes: tuple[int, ...]  # UTF-8 bytes of each continuation as the file gives it
    where: str


@dataclass(frozen=True)
class Task:
    """The rows of a file; all of one shape, a key of `SHAPES`."""

    name: str
    path: str
    sha256: str
    shape: str
    rows: tuple[TaskRow, ...]


class TaskResult(NamedTuple):
    """Result on the rows that were scored.

    Fields:
      numbers: acc, acc_norm (choices alone), perplexity (cloze alone: exp of the mean over rows of -log p(continuation)), and
        for each its standard error, `NAME_error`.
      correct: float64 [n], 1 where `acc` counts the row.
    """

    numbers: dict[str, float]
    correct: np.ndarray


def open_task(name: str, argument: str, directories: Sequence[Path]) -> Task:
    """The task that `NAME:PATH` means, or NAME alone for a file NAME.jsonl or NAME_*.jsonl below a data folder.

    Raises:
      ConfigError: an unknown name, no file or several, or a row that is broken (`file:line` is named).
    """
    check_choice("--data", name, TASKS)
    path = find_file(argument, directories, f"--data: {name}") if argument else _only_file(name, directories)
    data = path.read_bytes()
    shape, rows = read_rows(decode_utf8(data, path), str(path))
    return Task(name, str(path), hashlib.sha256(data).hexdigest(), shape, rows)


def _only_file(name: str, directories: Sequence[Path]) -> Path:
    check(name != "jsonl", "--data", name, "give the file: jsonl:PATH")
    found = sorted({path for d in directories for pattern in (f"{name}.jsonl", f"{name}_*.jsonl") for path in d.glob(pattern)})
    places = ", ".join(str(d) for d in directories) or "no data folder"
    check(found, "--data", name, f"no {name}.jsonl or {name}_*.jsonl in {places}; give {name}:PATH")
    check(len(found) == 1, "--data", name, f"{', '.join(map(str, found))} all fit; give {name}:PATH")
    check(found[0].stat().st_size, "--data", name, f"{found[0]} is empty")
    return found[0]


def read_rows(text: str, path: str) -> tuple[str, tuple[TaskRow, ...]]:
    """(shape, rows) of JSON lines; blank lines are skipped.

    Raises:
      ConfigError: no row, a line that is not JSON or lacks keys, a value of the wrong type, a gold outside the choices, or rows
        of different shapes; `path:line` is named.
    """
    rows, shape = [], ""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of 5000 digits, and nesting without end
            raise ConfigError(f"{where}: not JSON: {error}") from None
        found = _shape_of(row, where)
        if shape and found != shape:
            raise ConfigError(f"{where}: a row {{{', '.join(SHAPES[found])}}} among rows {{{', '.join(SHAPES[shape])}}}")
        shape = found
        rows.append(_ROWS[shape](row, where))
    check(rows, "--data", path, "has no rows")
    return shape, tuple(rows)


def _shape_of(row: Any, where: str) -> str:
    if isinstance(row, dict):
        for shape, keys in SHAPES.items():
            if set(keys) <= set(row):
                return shape
    given = f"keys {', '.join(map(repr, row)) or 'none'}" if isinstance(row, dict) else f"a {type(row).__name__}"
    listed = ", ".join("{" + ", ".join(keys) + "}" for keys in SHAPES.values())
    raise ConfigError(f"{where}: {given}; a row is one of {listed}")


def _choices(row: dict[str, Any], where: str) -> TaskRow:
    choices = _texts(row, "choices", where)
    query = _text(row, "query", where)
    return _row([(query, choice) for choice in choices], choices, _gold(row, len(choices), where), where)


def _cloze(row: dict[str, Any], where: str) -> TaskRow:
    continuation = _text(row, "continuation", where)
    return _row([(_text(row, "context", where, empty=True), continuation)], [continuation], 0, where)


def _contexts(row: dict[str, Any], where: str) -> TaskRow:
    contexts, continuation = _texts(row, "context_options", where), _text(row, "continuation", where)
    gold = _gold(row, len(contexts), where)
    return _row([(context, continuation) for context in contexts], [continuation] * len(contexts), gold, where)


_ROWS: dict[str, Callable[[dict[str, Any], str], TaskRow]] = {"choices": _choices, "cloze": _cloze, "contexts": _contexts}


def _row(pairs: list[tuple[str, str]], counted: list[str], gold: int, where: str) -> TaskRow:
    joined = tuple((context + blank_between(context, continuation), continuation) for context, continuation in pairs)
    return TaskRow(joined, gold, tuple(len(text.encode("utf-8", "surrogatepass")) for text in counted), where)


def blank_between(context: str, continuation: str) -> str:
    """One blank, or none where one side has some already or there is no context."""
    return " " if context and not context[-1].isspace() and not continuation[:1].isspace() else ""


def _text(row: dict[str, Any], key: str, where: str, empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str) or not (value.strip() or empty):
        raise ConfigError(f"{where}: {key} = {value!r}: expected a text{'' if empty else ' that is not blank'}")
    check_unicode(value, f"{where}: {key}")
    return value


def _texts(row: dict[str, Any], key: str, where: str) -> list[str]:
    values = row[key]
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(v, str) and v.strip() for v in values):
        raise ConfigError(f"{where}: {key} = {values!r}: expected a list of two or more texts that are not blank")
    for value in values:
        check_unicode(value, f"{where}: {key}")
    return values


def _gold(row: dict[str, Any], count: int, where: str) -> int:
    gold = row["gold"]
    if type(gold) is not int or not 0 <= gold < count:
        raise ConfigError(f"{where}: gold = {gold!r}: expected the number of the right one, 0 to {count - 1}")
    return gold


def encode_pairs(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, where: Sequence[str]) -> list[Row]:
    """The rows that score each continuation after its context.

    lm-eval's rule: blanks at the end of a context move to its continuation; both are tokenized together, with the specials that
    the tokenizer puts before a text; what follows as many tokens as the context alone has is scored. A continuation after
    nothing follows the BOS (where the vocabulary has none, the end-of-text token).

    Args:
      where: a name for each pair, for messages.
    Raises:
      ConfigError: a continuation that leaves no token to score.
    """
    prefix = list(tokenizer.prefix_ids)
    contexts, wholes = [], []
    for context, continuation in pairs:
        kept = context.rstrip()
        contexts.append(kept)
        wholes.append(kept + context[len(kept) :] + continuation)
    rows = []
    for context, before, after, name in zip(contexts, *map(tokenizer.encode_batch, (contexts, wholes)), where, strict=True):
        if context:
            tokens, start = [*prefix, *after.tolist()], len(prefix) + len(before)
        else:
            tokens = after.tolist()
            tokens, start = (tokens if tokens[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *tokens]), 1
        check(start < len(tokens), name, context[-40:], "the continuation adds no token to this context")
        rows.append(Row(np.array(tokens, np.int32), start))
    return rows


def truncate(rows: Sequence[Row], max_length: int, where: Sequence[str]) -> tuple[list[Row], int]:
    """(rows that fit, how many were shortened): the beginning of a context goes, so that `max_length` inputs are left.

    Raises:
      ConfigError: a continuation that alone is longer than that.
    """
    kept, count = [], 0
    for row, name in zip(rows, where, strict=True):
        excess = max(0, len(row.tokens) - max_length - 1)
        scored = len(row.tokens) - row.start
        check(excess < row.start, name, scored, f"the continuation has more tokens than the model takes ({max_length})")
        kept.append(Row(row.tokens[excess:], row.start - excess))
        count += excess > 0
    return kept, count


class EncodedTask(NamedTuple):
    """The first questions of a task as rows to score, their pairs one after the other; how many rows were truncated."""

    task: Task
    questions: tuple[TaskRow, ...]
    rows: list[Row]
    truncated: int


def encode_task(task: Task, tokenizer: Tokenizer, max_length: int, limit: int) -> EncodedTask:
    """Tokenize the first `limit` questions (0: all)."""
    questions = task.rows[: limit or None]
    where = [question.where for question in questions for _ in question.pairs]
    rows = encode_pairs([pair for question in questions for pair in question.pairs], tokenizer, where)
    return EncodedTask(task, questions, *truncate(rows, max_length, where))


def score_task(scorer: Scorer, encoded: EncodedTask, advance: Callable[[int], None] = lambda tokens: None) -> TaskResult:
    """Metrics of a task; `advance` is called with the number of tokens finished since the last call."""
    scores = scorer.score(encoded.rows, advance)
    if encoded.task.shape == "cloze":
        correct = scores.greedy.astype(np.float64)
        log_loss, error = mean_and_error(scores.nll)
        perplexity = float(np.exp(log_loss))
        cloze = {"perplexity": perplexity, "perplexity_error": perplexity * error}
        return TaskResult({**_measured("acc", correct), **cloze}, correct)
    borders = np.cumsum([len(question.pairs) for question in encoded.questions])[:-1]
    correct, normalised = np.zeros(len(encoded.questions)), np.zeros(len(encoded.questions))
    for i, (question, nll) in enumerate(zip(encoded.questions, np.split(scores.nll, borders), strict=True)):
        correct[i] = np.argmin(nll) == question.gold
        normalised[i] = np.argmin(nll / np.array(question.num_bytes)) == question.gold
    numbers = _measured("acc", correct)
    if encoded.task.shape == "choices":  # elsewhere the continuations are the same, and so are their lengths
        numbers |= _measured("acc_norm", normalised)
    return TaskResult(numbers, correct)


def _measured(name: str, values: np.ndarray) -> dict[str, float]:
    return dict(zip((name, f"{name}_error"), mean_and_error(values), strict=True))
