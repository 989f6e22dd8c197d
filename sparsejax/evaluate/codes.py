"""Activation codes: the signs of a layer's hidden units as a hash of the token (arXiv 2101.05490).

c(x) = 1[z > 0], z what enters the non-linearity. redundancy = (N - distinct codes) / N: 0 where every token has a code of its
own. Bits are packed into words, so that the Hamming distance is population_count(a ^ b): 60,000 codes of 1,000 bits are 8 MB.
Not here: clustering and classification of codes (k-means, nearest neighbours, logistic regression).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

WORD = 32
PAIRS = 2048


@dataclass(frozen=True)
class CodeStatistics:
    """Of the codes of N tokens; L layers.

    Fields:
      tokens: N.
      distinct: [L], and `distinct_all_layers` of the codes concatenated over layers.
      redundancy: [L].
      hamming_neighbours, hamming_random: [L], mean distance in bits of neighbouring tokens, and of random pairs.
    """

    tokens: int
    distinct: np.ndarray
    distinct_all_layers: int
    redundancy: np.ndarray
    hamming_neighbours: np.ndarray
    hamming_random: np.ndarray

    @classmethod
    def of(cls, fields: Mapping[str, np.ndarray]) -> CodeStatistics:
        """From its fields as arrays."""
        found: dict[str, Any] = {name: value.item() if value.ndim == 0 else value for name, value in fields.items()}
        return cls(**found)


def pack(bits: Bool[Array, "... F"]) -> UInt32[Array, "... W"]:
    """W = ceil(F / 32) words; bit i of a word is unit 32 w + i, missing ones are 0."""
    words = -(-bits.shape[-1] // WORD)
    padded = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, words * WORD - bits.shape[-1])])
    split = padded.reshape(*bits.shape[:-1], words, WORD).astype(jnp.uint32)
    return jnp.sum(jnp.left_shift(split, _places(split.ndim)), axis=-1, dtype=jnp.uint32)


def unpack(words: UInt32[Array, "... W"], width: int) -> Bool[Array, "... F"]:
    """The inverse of `pack` for F = `width` units."""
    bits = jnp.right_shift(words[..., None], _places(words.ndim + 1)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :width].astype(bool)


def _places(ndim: int) -> Array:
    """0 to 31 along the last of so many axes."""
    return jnp.arange(WORD, dtype=jnp.uint32).reshape((1,) * (ndim - 1) + (WORD,))


def hamming(a: UInt32[Array, "... W"], b: UInt32[Array, "... W"]) -> Int[Array, ...]:
    """Bits in which two codes differ."""
    return jnp.sum(jax.lax.population_count(a ^ b).astype(jnp.int32), axis=-1)


def code_statistics(codes: UInt32[np.ndarray, "L N W"], length: int, seed: int = 0) -> CodeStatistics:
    """Of tokens in sequences of `length`, one after the other."""
    layers, count, _ = codes.shape
    ids = np.stack([np.unique(layer, axis=0, return_inverse=True)[1].reshape(-1) for layer in codes])
    distinct = ids.max(axis=1) + 1
    left, right = np.random.default_rng(seed).integers(0, count, (2, PAIRS))
    apart = (left != right) & (count > 1)
    neighbours = np.flatnonzero(np.arange(1, count) % length)

    def mean_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        if not len(one):
            return np.full(layers, np.nan)
        return np.array([np.mean(np.asarray(hamming(layer[one], layer[other]))) for layer in codes])

    return CodeStatistics(
        tokens=count,
        distinct=distinct,
        distinct_all_layers=len(np.unique(ids.T, axis=0)),
        redundancy=(count - distinct) / count,
        hamming_neighbours=mean_distance(neighbours, neighbours + 1),
        hamming_random=mean_distance(left[apart], right[apart]),
    )
