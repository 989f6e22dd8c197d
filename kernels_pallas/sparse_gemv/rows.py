"""Weights as their rows are read one at a time, whatever they are stored as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax


class Rows(NamedTuple):
    """A weight [K, N]; lives inside a trace. Numbers of a row come in `lanes`, [lanes, N / lanes] in any order that suits.

    shape: (K, N).
    group: as many consecutive rows share what `finish` does; the last group may be shorter.
    read: k -> float32[lanes, n], the numbers of row k, without what all rows of a group have in common.
    finish: (g, sum over the group of x_k read(k) [B, lanes, n], sum of x_k [B]) -> its share of y, [B, lanes, n].
    join: [B, lanes, n] -> [B, N].
    width: (lanes, n).
    """

    shape: tuple[int, int]
    group: int
    width: tuple[int, int]
    read: Callable[[Any], Any]
    finish: Callable[[Any, Any, Any], Any]
    join: Callable[[Any], Any]


def float_rows(w: Any) -> Rows:
    """Of a plain array [K, N] of any float dtype."""

    def read(k):
        return lax.dynamic_index_in_dim(w, k, keepdims=False).astype(jnp.promote_types(w.dtype, jnp.float32))[None]

    return Rows(w.shape, w.shape[0], (1, w.shape[1]), read, lambda g, total, weight: total, lambda y: y[:, 0])
