"""Weights as their rows are read one at a time, whatever they are stored as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

Lanes = tuple[Any, ...]


class Rows(NamedTuple):
    """A weight [K, N]; lives inside a trace. Numbers of a row come in lanes, each an array [n] of its own, in any order that
    suits: sums of packed codes are vectorized where each lane has its own, not where they are interleaved.

    shape: (K, N).
    group: as many consecutive rows share what `finish` does; the last group may be shorter.
    width: (lanes, n).
    read: k -> the lanes of row k, float32[n] each, without what all rows of a group have in common.
    finish: (g, sums over the group of x_k read(k), [B, n] by lane, sum of x_k [B]) -> their shares of y, [B, n] by lane.
    join: [B, n] by lane -> [B, N].
    """

    shape: tuple[int, int]
    group: int
    width: tuple[int, int]
    read: Callable[[Any], Lanes]
    finish: Callable[[Any, Lanes, Any], Lanes]
    join: Callable[[Lanes], Any]


def float_rows(w: Any) -> Rows:
    """Of a plain array [K, N] of any float dtype."""

    def read(k):
        return (lax.dynamic_index_in_dim(w, k, keepdims=False).astype(jnp.promote_types(w.dtype, jnp.float32)),)

    return Rows(w.shape, w.shape[0], (1, w.shape[1]), read, lambda g, total, weights: total, lambda y: y[0])
