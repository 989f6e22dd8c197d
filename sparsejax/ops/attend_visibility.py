"""Which keys a query may see: causal order, window, packed segments, padding and prefix, as a mask made per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


class Span(NamedTuple):
    """Consecutive indices [start, start + size); inside a loop over blocks `start` is a traced integer."""

    start: int | Int[Array, ""]
    size: int


@dataclass(frozen=True)
class Visibility:
    """The mask of one attention call, evaluated per block of queries and keys.

    Query t sees key s when all of these hold, with positions `pos` (indices unless given):
      causal: pos(s) <= pos(t), or s is in the prefix;
      window w > 0: |pos(t) - pos(s)| < w, so a causal query sees w keys, itself included;
      segments: both have the same id and it is not 0 (padding); with key ids alone, the key's id is not 0.
    """

    num_queries: int
    num_keys: int
    causal: bool
    window: int = 0
    query_segment_ids: Int[Array, "B T"] | None = None
    key_segment_ids: Int[Array, "B S"] | None = None
    query_positions: Int[Array, "B T"] | None = None
    key_positions: Int[Array, "B S"] | None = None
    prefix: Bool[Array, "B S"] | None = None

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"window = {self.window}: 0 (off) or a number of keys")
        if self.query_segment_ids is not None and self.key_segment_ids is None:
            raise ValueError("query_segment_ids without key_segment_ids: give both, or the keys' alone to mask padding")
        if self.prefix is not None and not self.causal:
            raise ValueError("a prefix has no meaning where attention is not causal")
        if (self.causal or self.window) and self.ordered_by_index and self.num_queries != self.num_keys:
            raise ValueError(
                f"{self.num_queries} queries and {self.num_keys} keys: causal or windowed attention between different "
                "lengths needs query_positions and key_positions"
            )

    @property
    def ordered_by_index(self) -> bool:
        """Whether positions are the plain indices, so that a block's keys are known when tracing."""
        return self.query_positions is None and self.key_positions is None

    @property
    def depends_on_data(self) -> bool:
        """Whether the mask is more than a function of indices."""
        return self.key_segment_ids is not None or self.prefix is not None or not self.ordered_by_index

    def key_span(self, queries: Span) -> Span:
        """The keys outside of which these queries (with a static start) see nothing, for any data."""
        assert isinstance(queries.start, int)
        start, stop = queries.start, queries.start + queries.size
        low, high = 0, self.num_keys
        if self.ordered_by_index and self.window:
            low, high = max(0, start - self.window + 1), min(high, stop + self.window - 1)
        if self.ordered_by_index and self.causal and self.prefix is None:
            high = min(high, stop)
        return Span(low, high - low)

    def block_positions(self, queries: Span, keys: Span) -> tuple[Array, Array]:
        """Positions of a block: [Tb] and [Sb], or [B, Tb] and [B, Sb] where either was given."""
        if self.ordered_by_index:
            return _indices(queries), _indices(keys)
        return _positions(self.query_positions, queries), _positions(self.key_positions, keys)

    def block(self, queries: Span, keys: Span) -> Bool[Array, "B Tb Sb"] | None:
        """The mask of a block of queries and keys; B and Tb may be 1; None where everything is visible."""
        visible = _both(self._near(queries, keys), self._same_segment(queries, keys))
        if not self.causal:
            return visible
        query_positions, key_positions = self._position_grid(queries, keys)
        ordered = key_positions <= query_positions
        if self.prefix is not None:
            ordered = ordered | take_span(self.prefix, keys, axis=1)[:, None, :].astype(bool)
        return _both(ordered, visible)

    def _position_grid(self, queries: Span, keys: Span) -> tuple[Array, Array]:
        query_positions, key_positions = (jnp.atleast_2d(p) for p in self.block_positions(queries, keys))
        return query_positions[:, :, None], key_positions[:, None, :]

    def _near(self, queries: Span, keys: Span) -> Array | None:
        if not self.window:
            return None
        query_positions, key_positions = self._position_grid(queries, keys)
        return jnp.abs(query_positions - key_positions) < self.window

    def _same_segment(self, queries: Span, keys: Span) -> Array | None:
        if self.key_segment_ids is None:
            return None
        key_ids = take_span(self.key_segment_ids, keys, axis=1)[:, None, :]
        if self.query_segment_ids is None:
            return key_ids != 0
        return (take_span(self.query_segment_ids, queries, axis=1)[:, :, None] == key_ids) & (key_ids != 0)


def take_span(array: Array, span: Span, *, axis: int) -> Array:
    """`array[span]` along `axis`."""
    if isinstance(span.start, int):
        return lax.slice_in_dim(array, span.start, span.start + span.size, axis=axis)
    return lax.dynamic_slice_in_dim(array, span.start, span.size, axis=axis)


def _indices(span: Span) -> Array:
    return span.start + jnp.arange(span.size)


def _positions(given: Array | None, span: Span) -> Array:
    return _indices(span)[None] if given is None else take_span(given, span, axis=1)


def _both(left: Array | None, right: Array | None) -> Array | None:
    if left is None or right is None:
        return right if left is None else left
    return left & right
