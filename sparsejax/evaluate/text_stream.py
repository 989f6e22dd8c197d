"""Tokens to text as they come: whole characters only, and never a part of what ends a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from sparsejax.evaluate.generate import Decoder, stream
from sparsejax.evaluate.sampling import Sampling
from sparsejax.plugs import check

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of an unfinished character
CONTEXT = 8  # tokens of the prompt that new ones are decoded behind, since some decoders drop a leading space


class Tokenizer(Protocol):
    """What text generation asks of a tokenizer."""

    def encode(self, text: str) -> Any: ...

    def decode(self, ids: Any, /) -> str: ...


class TextStream:
    """The text of one continuation, given out as far as it is settled.

    An unfinished character, and text that may become a stop string, is held back until the next tokens decide it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        for index, string in enumerate(stop):
            check(string, f"stop[{index}]", string, "must not be empty")
        self._tokenizer = tokenizer
        self._context = list(prompt[-CONTEXT:])
        self._before = len(tokenizer.decode(self._context))
        self._ids: list[int] = []
        self._stop = tuple(stop)
        self.text = ""  # all that was given out
        self.stopped = False  # whether a stop string was met

    def push(self, ids: Iterable[int]) -> str:
        """The text that more tokens settle."""
        self._ids += map(int, ids)
        return self._settle(last=False)

    def finish(self) -> str:
        """What was held back and is text after all, broken characters included."""
        return self._settle(last=True)

    def _settle(self, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._tokenizer.decode([*self._context, *self._ids])[self._before :]
        found = [index for index in (text.find(string) for string in self._stop) if index >= 0]
        if found:
            text, self.stopped = text[: min(found)], True
        elif not last:
            text = text.rstrip(BROKEN)
            text = text[: len(text) - _open_end(text, self._stop)]
        new, self.text = text[len(self.text) :], max(self.text, text, key=len)
        return new


def _open_end(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(string) for string in stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-size:]) for string in stop):
            return size
    return 0


def stream_text(
    decoder: Decoder,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    seed: int | Sequence[int] = 0,
    ends: Sequence[int] = (),
    stop: Sequence[str] = (),
) -> Iterator[tuple[list[str], list[int]]]:
    """(new text, tokens decoded for it) of every row, chunk by chunk; arguments as in `generate.generate`.

    What a chunk decodes after a stop string counts as decoded.

    Args:
      stop: strings that end a row; neither they nor what follows is given out.
    """
    rows = [TextStream(tokenizer, prompt, stop) for prompt in prompts]
    chunks = stream(decoder, params, prompts, max_new_tokens, sampling, seed, ends)
    ending = set(ends)
    for chunk in chunks:
        texts, counts = [], []
        for row, tokens, count in zip(rows, chunk.tokens.tolist(), chunk.counts.tolist(), strict=True):
            new = tokens[:count]
            counts.append(0 if row.stopped else count)
            texts.append(row.push(new[:-1] if new and new[-1] in ending else new))
        yield texts, counts
        if all(row.stopped for row in rows):
            break
    yield [row.finish() for row in rows], [0] * len(rows)


def generate_text(
    decoder: Decoder,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    seed: int | Sequence[int] = 0,
    ends: Sequence[int] = (),
    stop: Sequence[str] = (),
) -> list[str]:
    """The continuations of text prompts, without the prompts, end tokens and stop strings; arguments as in `stream_text`."""
    encoded = [list(map(int, tokenizer.encode(prompt))) for prompt in prompts]
    parts = stream_text(decoder, params, tokenizer, encoded, max_new_tokens, sampling, seed, ends, stop)
    return ["".join(row) for row in zip(*(texts for texts, _ in parts), strict=True)]
