"""The texts that models are scored on, by name: which file, which split, how it becomes one string.

  wikitext2[:PATH]                   the test split; rows joined with a blank line, see `join_rows`
  c4_sample[:calibration|evaluation] halves of the file's bytes; `evaluation` unless said
  stdlib[:calibration|evaluation]    disjoint modules of Python's own library and topics of its documentation
  text:PATH                          any UTF-8 file as it stands

A file is looked for as given, then below the data folders (`data.sources.data_directories`). Both sides of a split are defined
here, also for those who calibrate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sparsejax.data.sources import StdlibText, decode_utf8, find_file
from sparsejax.plugs import ConfigError, check, check_choice

SPLITS = ("calibration", "evaluation")
JOINT = "\n\n"


@dataclass(frozen=True)
class EvaluationText:
    """One string to be tokenized once.

    Fields:
      name: as results report it.
      text: what is scored.
      path: the file it was read from, or `stdlib`.
      rule: how the text was made from it.
    """

    name: str
    text: str
    path: str
    rule: str

    @cached_property
    def sha256(self) -> str:
        """Of the UTF-8 bytes of `text`."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def split_specs(given: Sequence[str]) -> list[tuple[str, str]]:
    """(name, what follows its colon) of every entry of `--data`, which may be repeated or hold several, separated by commas.

    Raises:
      ConfigError: nothing given, an empty entry, or one given twice.
    """
    parts = [part.strip() for text in given for part in text.split(",")]
    check(parts, "--data", "", "give what to evaluate on, e.g. wikitext2 or text:PATH")
    found = []
    for part in parts:
        check(part, "--data", ",".join(given), "there is an empty entry between commas")
        name, colon, argument = part.partition(":")
        check(argument or not colon, "--data", part, "nothing follows the colon")
        check((name, argument) not in found, "--data", part, "given twice")
        found.append((name, argument))
    return found


def open_text(name: str, argument: str, directories: Sequence[Path]) -> EvaluationText:
    """The text that `NAME:ARGUMENT` means.

    Args:
      name: one of `TEXTS`.
      argument: a path or a split; empty for the default.
      directories: data folders, searched in order.
    Raises:
      ConfigError: an unknown name or split, or a file that is missing, empty or not UTF-8.
    """
    check_choice("--data", name, TEXTS)
    return TEXTS[name](argument, directories)


def read_text(path: Path) -> str:
    """A UTF-8 file that holds more than blanks."""
    text = decode_utf8(path.read_bytes(), path)
    check(text.strip(), "--data", str(path), "holds nothing but blanks")
    return text


def join_rows(text: str) -> str:
    """The rows of a WikiText file joined with a blank line, as its published form on the hub gives them.

    A row is a line with its line break, and empty where the line is blank: `" = Title = \\n"`, `""`, ...
    """
    lines = text.split("\n")
    rows = [f"{line}\n" for line in lines[:-1]] + lines[-1:] * bool(lines[-1])
    return JOINT.join(row if row.strip() else "" for row in rows)


def wikitext2(argument: str, directories: Sequence[Path]) -> EvaluationText:
    """A WikiText-2 file, as published (a row a line, a blank holds a space) or joined before (blank lines are empty).

    The name is `wikitext2-tok` where rare words are `<unk>`. The raw variant has ` @-@ ` too, which therefore tells nothing.
    """
    names = (argument,) if argument else ("wikitext2_test.txt", "wiki.test.raw", "wiki.test.tokens")
    path = _first_file(names, directories, "--data: wikitext2")
    text = read_text(path)
    joined = JOINT in text
    rule = "as the file stands, its rows were joined before" if joined else "rows joined with a blank line"
    name = "wikitext2-tok" if "<unk>" in text else "wikitext2"
    return EvaluationText(name, text if joined else join_rows(text), str(path), rule)


def c4_sample(argument: str, directories: Sequence[Path]) -> EvaluationText:
    """The first half of the file's bytes calibrates, the second evaluates; the character on the border goes to the second."""
    split = _split(argument, "c4_sample")
    path = find_file("c4_sample.txt", directories, "--data: c4_sample")
    data = read_text(path).encode()
    cut = len(data) // 2
    while cut and data[cut] & 0xC0 == 0x80:
        cut -= 1
    half = data[:cut] if split == "calibration" else data[cut:]
    return EvaluationText(f"c4_sample:{split}", half.decode(), str(path), f"{split} half of the file's bytes")


def stdlib(argument: str, directories: Sequence[Path]) -> EvaluationText:
    """Modules and topics of a split, joined with a blank line."""
    split = _split(argument, "stdlib")
    documents = StdlibText().documents("train" if split == "calibration" else "evaluation")
    rule = f"{len(documents)} documents joined with a blank line"
    return EvaluationText(f"stdlib:{split}", JOINT.join(documents), "stdlib", rule)


def plain(argument: str, directories: Sequence[Path]) -> EvaluationText:
    """A file as it stands."""
    check(argument, "--data", "text", "give the file: text:PATH")
    path = find_file(argument, directories, "--data: text")
    return EvaluationText(f"text:{argument}", read_text(path), str(path), "the file as it stands")


TEXTS: dict[str, Callable[[str, Sequence[Path]], EvaluationText]] = {
    "wikitext2": wikitext2,
    "c4_sample": c4_sample,
    "stdlib": stdlib,
    "text": plain,
}


def _split(argument: str, name: str) -> str:
    split = argument or "evaluation"
    check_choice(f"--data: split of {name}", split, SPLITS)
    return split


def _first_file(names: Sequence[str], directories: Sequence[Path], field: str) -> Path:
    """The first of several names that is found; the error is that of the first."""
    errors = []
    for name in names:
        try:
            return find_file(name, directories, field)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]
