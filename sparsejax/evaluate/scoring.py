"""Log-likelihoods of tokens given all that stands before them: the one primitive under perplexity and multiple choice.

A row is a list of tokens of which the last ones are scored. Rows are sorted by length into a few shapes, each compiled once;
padding follows a row, where a causal model cannot see it, so a score does not depend on the company it is computed in. The
head is applied to the scored positions alone, and to so few at a time that B x T x V logits never exist.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsejax import nnx_compat
from sparsejax.context import Context, Probe
from sparsejax.evaluate.scope import Scope
from sparsejax.io.model import Model
from sparsejax.plugs import check

# Lengths are rounded up to a multiple of it: few distinct lengths, and blocks of attention that fit.
LENGTH_MULTIPLE = 16
# What compiling one more shape costs, in tokens that are scored in the same time (135M parameters: 5 s on 2 CPU cores).
COMPILE_TOKENS = {"cpu": 2_048, "gpu": 2**19, "tpu": 2**19}
# Tokens of one forward pass. On CPU more only leave the caches; elsewhere the device must be filled.
BATCH_TOKENS = {"cpu": 1_024, "gpu": 2**15, "tpu": 2**15}
# float32 logits held at once.
CHUNK_ELEMENTS = {"cpu": 2**23, "gpu": 2**27, "tpu": 2**26}


class Row(NamedTuple):
    """Tokens int[N], of which those from `start` on (1 <= start < N) are scored, each given all before it."""

    tokens: np.ndarray
    start: int


class Scores(NamedTuple):
    """Of each row: -log p of its scored tokens in nats (float64 [R]), and whether greedy decoding gives them (bool [R])."""

    nll: np.ndarray
    greedy: np.ndarray


class Meter(NamedTuple):
    """What is measured while rows are scored.

    Fields:
      probes: see `Context.probes`.
      reduce: (statistics of a forward pass by site, which tokens count bool[B, T]) -> a tree of sums over those tokens.
    """

    probes: tuple[Probe, ...]
    reduce: Callable[[dict[str, Any], Array], Any]


class Bucket(NamedTuple):
    """Rows that share a shape: `batch` of them at a time, padded to `length` inputs of which at most `scored` count."""

    rows: list[int]
    batch: int
    length: int
    scored: int


class Scorer:
    """Scores rows under a causal language model; what it compiled stays, so that further data of the same shapes is free."""

    def __init__(self, model: Model, batch: int = 0, scope: Scope = Scope(), meter: Meter | None = None):
        """Check the model.

        Args:
          model: a decoder that predicts tokens.
          batch: rows per forward pass; 0: as many as `BATCH_TOKENS` allow.
          scope: at which tokens of a row activation sparsity acts.
          meter: measures the tokens in scope, see `measured`.
        Raises:
          ConfigError: not a causal language model, or a negative batch.
        """
        config = model.config
        what = "a classifier" if config.num_classes else f"of kind {config.kind!r}" if config.head else "without an output head"
        check(config.kind == "decoder" and config.head and not config.num_classes, "--model", model.name,
              f"is {what}; likelihoods of text need a decoder that predicts the next token")
        check(batch >= 0, "--batch", batch, "must be 0 (chosen by length) or more")
        self.model, self.batch, self.scope, self.meter = model, batch, scope, meter
        self._measured: Any = None
        self.compiled_shapes: list[tuple[int, ...]] = []  # (batch, length, scored) of each program traced so far
        self._step = jax.jit(self._trace, static_argnames="whole")

    @property
    def max_length(self) -> int:
        """Inputs that the model takes at once."""
        return self.model.config.max_length

    def measured(self) -> Any:
        """The meter's sums (float64) over the tokens in scope that were scored since the last call; padding is left out."""
        found, self._measured = self._measured, None
        return found

    def score(self, rows: Sequence[Row], advance: Callable[[int], None] = lambda tokens: None) -> Scores:
        """Score rows, in any order of length.

        Args:
          rows: each at most `max_length + 1` tokens.
          advance: called with the number of tokens finished since the last call.
        Raises:
          ConfigError: a row that is too long or has nothing to score.
        """
        for index, row in enumerate(rows):
            check(1 <= row.start < len(row.tokens), f"row {index}", (row.start, len(row.tokens)), "has no token to score")
            check(len(row.tokens) <= self.max_length + 1, f"row {index}", len(row.tokens),
                  f"the model takes {self.max_length} tokens and predicts one more")
        platform = jax.default_backend()
        nll, greedy = np.zeros(len(rows)), np.zeros(len(rows), bool)
        pending: collections.deque[tuple[list[int], Any]] = collections.deque()

        def finish() -> None:
            chosen, found = pending.popleft()
            sums, hits, measured = jax.device_get(found)
            nll[chosen], greedy[chosen] = sums[: len(chosen)], hits[: len(chosen)]
            if self.meter is not None:
                total = jax.tree.map(lambda a: np.asarray(a, np.float64), measured)
                self._measured = total if self._measured is None else jax.tree.map(np.add, self._measured, total)
            advance(sum(len(rows[i].tokens) for i in chosen))

        for bucket in plan_buckets(rows, self.batch, self.max_length, platform):
            for begin in range(0, len(bucket.rows), bucket.batch):
                chosen = bucket.rows[begin : begin + bucket.batch]
                arrays = pack([rows[i] for i in chosen], bucket)
                lengths = [len(rows[i].tokens) for i in chosen]
                masks = self._sparse(lengths, bucket), self._metered(lengths, bucket)
                whole = bucket.scored == bucket.length
                pending.append((chosen, self._step(self.model.values, *arrays, *masks, whole=whole)))
                if len(pending) > (platform != "cpu"):  # one batch ahead; on CPU two would compete for the cores
                    finish()
        while pending:
            finish()
        return Scores(nll, greedy)

    def _sparse(self, lengths: Sequence[int], bucket: Bucket) -> np.ndarray | None:
        """bool[batch, length], see `Context.sparsify`; None where the scope is all tokens."""
        return None if self.scope == Scope() else self._in_scope(lengths, bucket)

    def _metered(self, lengths: Sequence[int], bucket: Bucket) -> np.ndarray | None:
        """bool[batch, length]: inputs in scope, without padding; None where nothing is measured."""
        if self.meter is None:
            return None
        last = np.zeros(bucket.batch, np.int32)
        last[: len(lengths)] = np.asarray(lengths) - 1  # the last token is predicted, not read
        return self._in_scope(lengths, bucket) & (np.arange(bucket.length) < last[:, None])

    def _in_scope(self, lengths: Sequence[int], bucket: Bucket) -> np.ndarray:
        first = np.zeros(bucket.batch, np.int32)
        first[: len(lengths)] = [self.scope.first_sparse(length) for length in lengths]
        return np.arange(bucket.length) >= first[:, None]

    def _trace(
        self,
        values: dict[str, Any],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B C"],
        targets: Int[Array, "B C"],
        counted: Bool[Array, "B C"],
        sparse: Bool[Array, "B T"] | None = None,
        metered: Bool[Array, "B T"] | None = None,
        *,
        whole: bool,
    ) -> tuple[Float[Array, " B"], Bool[Array, " B"], Any]:
        self.compiled_shapes.append((*tokens.shape, targets.shape[1]))
        module = nnx_compat.merge(self.model.structure, values)
        probes = () if self.meter is None else self.meter.probes
        h, stats, _ = module.features({"tokens": tokens}, Context(mode="prefill", sparsify=sparse, probes=probes))
        measured = None if self.meter is None or metered is None else self.meter.reduce(stats, metered)
        if not whole:
            h = jnp.take_along_axis(h, positions[..., None], axis=1)
        nll, hit = token_scores(module.logits, h.reshape(-1, h.shape[-1]), targets.reshape(-1), self.model.config.vocab_size)
        nll, hit = nll.reshape(targets.shape), hit.reshape(targets.shape)
        return jnp.sum(jnp.where(counted, nll, 0), axis=1), jnp.all(hit | ~counted, axis=1), measured


def token_scores(
    head: Callable[[Array], Array], h: Float[Array, "N D"], targets: Int[Array, " N"], vocab_size: int
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """(-log p in nats, whether argmax is the target) of each target, `CHUNK_ELEMENTS` logits at a time."""
    count = len(targets)
    chunks = max(1, -(-count * vocab_size // CHUNK_ELEMENTS[jax.default_backend()]))
    size = -(-count // chunks)
    padded = [jnp.pad(a, [(0, chunks * size - count)] + [(0, 0)] * (a.ndim - 1)) for a in (h, targets)]

    def piece(xs: tuple[Array, Array]) -> tuple[Array, Array]:
        return _from_logits(head(xs[0]), xs[1])

    if chunks == 1:
        return piece((h, targets))
    nll, hit = jax.lax.map(piece, tuple(a.reshape(chunks, size, *a.shape[1:]) for a in padded))
    return nll.reshape(-1)[:count], hit.reshape(-1)[:count]


def _from_logits(logits: Float[Array, "N V"], targets: Int[Array, " N"]) -> tuple[Array, Array]:
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)
    # What argmax (the first of equals) says, as a reduction that XLA:CPU vectorizes; its argmax is a scalar loop.
    earlier = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) < targets[:, None]
    beaten = jnp.any((logits > chosen) | ((logits == chosen) & earlier), axis=1)
    return jax.nn.logsumexp(logits, axis=1) - chosen[:, 0], ~beaten


def pack(rows: Sequence[Row], bucket: Bucket) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs [B, T]; positions, targets and whether they count, [B, C]. Rows that are missing to a full batch count nothing."""
    tokens = np.zeros((bucket.batch, bucket.length), np.int32)
    positions = np.zeros((bucket.batch, bucket.scored), np.int32)
    targets, counted = np.zeros_like(positions), np.zeros(positions.shape, bool)
    for b, row in enumerate(rows):
        tokens[b, : len(row.tokens) - 1] = row.tokens[:-1]
        first = 0 if bucket.scored == bucket.length else row.start - 1
        slots = slice(row.start - 1 - first, len(row.tokens) - 1 - first)
        positions[b] = np.minimum(first + np.arange(bucket.scored), bucket.length - 1)
        targets[b, slots], counted[b, slots] = row.tokens[row.start :], True
    return tokens, positions, targets, counted


def plan_buckets(rows: Sequence[Row], batch: int, max_length: int, platform: str) -> list[Bucket]:
    """The rows in groups of similar length, as few as the padding they cost makes worth compiling for.

    Args:
      batch: rows per forward pass; 0: by `BATCH_TOKENS`.
      max_length: no shape is longer.
    """
    if not rows:
        return []
    needed = np.array([min(_round_up(len(row.tokens) - 1), max_length) for row in rows])
    lengths, counts = np.unique(needed, return_counts=True)
    buckets, low = [], 0
    for high in _borders(lengths, counts, COMPILE_TOKENS[platform]):
        length = int(lengths[high - 1])
        chosen = np.flatnonzero((needed >= lengths[low]) & (needed <= length)).tolist()
        scored = _round_up(max(len(rows[i].tokens) - rows[i].start for i in chosen))
        most = min(batch or max(1, BATCH_TOKENS[platform] // length), len(chosen))
        passes = -(-len(chosen) // most)
        buckets.append(Bucket(chosen, -(-len(chosen) // passes), length, scored if 2 * scored <= length else length))
        low = high
    return buckets[::-1]  # the longest first: what does not fit the memory shows at once


def _borders(lengths: np.ndarray, counts: np.ndarray, compile_tokens: int) -> list[int]:
    """Where to cut the sorted distinct lengths so that padded tokens plus compilations cost least (dynamic programming)."""
    before = np.concatenate([[0], np.cumsum(counts)])
    best, cut = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, int)
    for high in range(1, len(lengths) + 1):
        cost = best[:high] + (before[high] - before[:high]) * lengths[high - 1] + compile_tokens
        cut[high] = int(np.argmin(cost))
        best[high] = cost[cut[high]]
    borders = [len(lengths)]
    while cut[borders[-1]]:
        borders.append(int(cut[borders[-1]]))
    return borders[::-1]


def _round_up(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
