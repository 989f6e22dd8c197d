"""How fast a model generates, beside what the memory of the device allows.

Decoding a token reads every weight once and the cache once, so that its bound is bytes read over the rate at which this device
reads memory, measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.evaluate.generate import Decoder, stream
from sparsejax.evaluate.sampling import Sampling
from sparsejax.layers.cache import KVCache, read_sizes

PROBE_BYTES = 2**29  # of one array; more than twice the last-level cache of what this runs on, or make it larger
BATCH_ROWS = 4096


class Speed(NamedTuple):
    """prefill, decode: tokens per second, of all rows together; step_seconds: to decode one token of every row."""

    prefill: float
    decode: float
    step_seconds: float


class Probe:
    """Measures the memory of the default device; made once, so that it compiles once."""

    def __init__(self, size: int = PROBE_BYTES):
        self._matrix = jnp.ones((BATCH_ROWS, size // 4 // BATCH_ROWS), jnp.float32)
        self._vector = jnp.ones(self._matrix.shape[1:], jnp.float32)
        self._product = jax.jit(jnp.matmul)
        self._add = jax.jit(lambda a: a + 1, donate_argnums=0)
        self.read()
        self.copy()

    def read(self, repeats: int = 3) -> float:
        """Bytes per second of the fastest of `repeats` products of a matrix and a vector: what decoding is made of."""
        return self._matrix.nbytes / min(_seconds(lambda: self._product(self._matrix, self._vector)) for _ in range(repeats))

    def copy(self, repeats: int = 3) -> float:
        """Bytes per second, read and written, of the fastest of `repeats` updates in place."""

        def update() -> Any:
            self._matrix = self._add(self._matrix)
            return self._matrix

        return 2 * self._matrix.nbytes / min(_seconds(update) for _ in range(repeats))


def measure(
    decoder: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: Sampling = Sampling(temperature=0),  # noqa: B008  (frozen)
    slots: int = 0,
) -> Speed:
    """Prefill and decode speed of a run that no end token shortens; what it needs is compiled by an equal run before it.

    Args:
      new_tokens: of each row, at least two: the first belongs to the prefill.
      slots: of the cache, as in `generate.stream`.
    """
    start = time.perf_counter()
    chunks = stream(decoder, params, prompts, new_tokens, sampling, slots=slots)
    next(chunks)
    prefilled = time.perf_counter()
    for _ in chunks:
        pass
    step = (time.perf_counter() - prefilled) / (new_tokens - 1)
    return Speed(sum(map(len, prompts)) / (prefilled - start), len(prompts) / step, step)


def cache_read_bytes(decoder: Decoder, rows: int, slots: int, filled: int) -> int:
    """Bytes of keys and values that a step reads from a cache of `slots` of which `filled` are."""
    caches = jax.eval_shape(lambda: decoder.empty_cache(rows, slots))
    total = 0
    for cache in jax.tree.leaves(caches, is_leaf=lambda node: isinstance(node, KVCache)):
        stored = sum(array.size * array.dtype.itemsize for array in cache.store.values())
        held = min(filled, cache.slots)
        total += stored * next(size for size in read_sizes(cache.slots) if size >= held) // cache.slots
    return total


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
