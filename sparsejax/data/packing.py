"""Documents to rows of fixed length, by random access: row i of an epoch is computed without building the rows before it.

A document is its tokens followed by an end-of-document id. A row is a run of consecutive tokens of one or more documents;
each token is a target exactly once per epoch. Inside a row each document has its own segment id and positions that start at 0.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparsejax.data.counter_random import generator
from sparsejax.plugs import check


@dataclass(frozen=True)
class PackedRow:
    """At most T tokens of one or more documents; all arrays have the same length n <= T, without padding.

    `tokens` are the tokens to be predicted or corrupted, `previous` the token before each of them in its own document (the
    beginning-of-document id before the first), `segment_ids` count from 1, `positions` from 0 in each segment.
    """

    tokens: np.ndarray
    previous: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray

    def segments(self) -> list[tuple[int, int]]:
        """Start and stop of each segment."""
        starts = np.flatnonzero(np.diff(self.segment_ids, prepend=0))
        return list(zip(starts.tolist(), [*starts[1:].tolist(), len(self.tokens)], strict=True))


class TokenStore(NamedTuple):
    """All documents of a split: `tokens[starts[d]:starts[d + 1]]` is document d with its end-of-document id."""

    tokens: np.ndarray
    starts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @staticmethod
    def build(documents: Sequence[np.ndarray], eos_id: int, vocab_size: int) -> TokenStore:
        """Concatenate; documents without tokens are left out."""
        kept = [d for d in documents if len(d)]
        starts = np.concatenate([[0], np.cumsum([len(d) + 1 for d in kept], dtype=np.int64)]).astype(np.int64)
        tokens = np.full(starts[-1], eos_id, np.uint16 if vocab_size <= 2**16 else np.int32)
        for start, document in zip(starts[:-1], kept, strict=True):
            tokens[start:start + len(document)] = document
        return TokenStore(tokens, starts)


def packed_row(pieces: Sequence[tuple[np.ndarray, int]]) -> PackedRow:
    """A row of (tokens of one document, the token before them) pieces."""
    tokens = np.concatenate([p for p, _ in pieces]).astype(np.int32)
    previous = np.concatenate([np.concatenate([[before], p[:-1]]) for p, before in pieces]).astype(np.int32)
    segment_ids = np.concatenate([np.full(len(p), i + 1, np.int32) for i, (p, _) in enumerate(pieces)])
    positions = np.concatenate([np.arange(len(p), dtype=np.int32) for p, _ in pieces])
    return PackedRow(tokens, previous, segment_ids, positions)


class Epoch(NamedTuple):
    """The order of one epoch: documents, the border before each of them (in tokens or rows), and rows."""

    documents: np.ndarray
    borders: np.ndarray
    rows: np.ndarray


class PackedRows:
    """Rows of length T over a token store.

    With `packing` the documents of an epoch, in the epoch's order, form one stream that is cut every T tokens; without it each
    document is cut by itself and a row holds one piece. `rows_per_epoch` is the same for every epoch.

    Args:
      store: documents of the split.
      length: T, tokens per row.
      packing: see above.
      bos_id: what precedes the first token of a document.
    """

    def __init__(self, store: TokenStore, length: int, packing: bool, bos_id: int):
        self.store, self.length, self.packing, self.bos_id = store, length, packing, bos_id
        lengths = store.lengths
        self._units = lengths if packing else -(-lengths // length)
        total = int(self._units.sum())
        self.rows_per_epoch = -(-total // length) if packing else total
        self._epochs: OrderedDict[tuple[int, int], Epoch] = OrderedDict()
        self._lock = threading.Lock()

    def row(self, seed: int, index: int) -> PackedRow:
        """Row number `index` of the endless sequence of epochs that `seed` orders."""
        number, within = divmod(index, self.rows_per_epoch)
        epoch = self._epoch(seed, number)
        pieces = self._stream_pieces if self.packing else self._document_piece
        return packed_row([self._piece(*p) for p in pieces(epoch, int(epoch.rows[within]))])

    def _epoch(self, seed: int, number: int) -> Epoch:
        with self._lock:  # prefetching threads share the table
            if (seed, number) not in self._epochs:
                documents = generator(seed, "order/documents", number).permutation(len(self._units))
                borders = np.concatenate([[0], np.cumsum(self._units[documents])])
                rows = generator(seed, "order/rows", number).permutation(self.rows_per_epoch)
                self._epochs[seed, number] = Epoch(documents, borders, rows)
                while len(self._epochs) > 3:
                    self._epochs.popitem(last=False)
            return self._epochs[seed, number]

    def _stream_pieces(self, epoch: Epoch, row: int) -> list[tuple[int, int, int]]:
        start, stop = row * self.length, min((row + 1) * self.length, int(epoch.borders[-1]))
        first = int(np.searchsorted(epoch.borders, start, "right")) - 1
        last = int(np.searchsorted(epoch.borders, stop, "left"))
        return [(int(epoch.documents[d]), max(start - int(epoch.borders[d]), 0),
                 min(stop, int(epoch.borders[d + 1])) - int(epoch.borders[d])) for d in range(first, last)]

    def _document_piece(self, epoch: Epoch, row: int) -> list[tuple[int, int, int]]:
        place = int(np.searchsorted(epoch.borders, row, "right")) - 1
        document = int(epoch.documents[place])
        start = (row - int(epoch.borders[place])) * self.length
        return [(document, start, min(start + self.length, int(self.store.lengths[document])))]

    def _piece(self, document: int, start: int, stop: int) -> tuple[np.ndarray, int]:
        base = int(self.store.starts[document])
        before = int(self.store.tokens[base + start - 1]) if start else self.bos_id
        return self.store.tokens[base + start:base + stop], before


class SampledRows:
    """Rows over a corpus too large to be tokenized beforehand: each row draws, reads and tokenizes its own documents.

    There are no epochs: documents are drawn with replacement, and one longer than what is left of the row contributes one
    random window (T5's `select_random_chunk`), so that long documents weigh less than under `PackedRows`.

    Args:
      num_documents: documents of the split.
      read: document number -> its tokens followed by the end-of-document id.
    """

    rows_per_epoch = None

    def __init__(self, num_documents: int, read: Callable[[int], np.ndarray], length: int, packing: bool, bos_id: int):
        self.num_documents, self.read = num_documents, read
        self.length, self.packing, self.bos_id = length, packing, bos_id

    def row(self, seed: int, index: int) -> PackedRow:
        """Row number `index`."""
        random = generator(seed, "sampled", index)
        pieces: list[tuple[np.ndarray, int]] = []
        room, empty = self.length, 0
        while room and (self.packing or not pieces):
            tokens = self.read(int(random.integers(self.num_documents)))
            if len(tokens) < 2:
                empty += 1
                check(empty < 1000, "data.source", self.num_documents, "1000 documents in a row are empty")
                continue
            start = int(random.integers(len(tokens) - room + 1)) if len(tokens) > room else 0
            pieces.append((tokens[start:start + room], int(tokens[start - 1]) if start else self.bos_id))
            room -= len(pieces[-1][0])
        return packed_row(pieces)
