"""Weights stored sparse: n kept of every m consecutive inputs (2:4 sparsity and its kin)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "indices"], meta_fields=["n", "m", "shape", "dtype"]
)
@dataclasses.dataclass
class NMSparse:
    """A weight of which every output keeps at most n of each m consecutive inputs; the others are zeros.

    values: what is kept, a weight operand of shape [..., in / m * n, out], by group and then by position.
    indices: uint8, the position within its group (below m) of each value, packed along inputs: four to a byte for m <= 4, two
      for m <= 16, one beyond; the first in the lowest bits. 2:4 in bfloat16 takes 9/16 of the dense bytes.
    shape: the trailing (in, out); what leads it (layers, experts) comes from the arrays. dtype: that of the dense weight.
    """

    values: Any
    indices: UInt8[Array, "*lead packed out"]
    n: int
    m: int
    shape: tuple[int, int]
    dtype: Any

    @property
    def ndim(self) -> int:
        return self.indices.ndim

    def positions(self) -> Int[Array, "*lead kept out"]:
        """The position within its group of each value, unpacked."""
        bits = index_bits(self.m)
        per_byte = 8 // bits
        shifts = bits * jnp.arange(per_byte, dtype=jnp.uint8)
        unpacked = (self.indices[..., None, :] >> shifts.reshape(*(1,) * (self.ndim - 1), -1, 1)) & (2**bits - 1)
        *lead, rows, _, columns = unpacked.shape
        kept = self.shape[0] // self.m * self.n
        return unpacked.reshape(*lead, rows * per_byte, columns)[..., :kept, :]

    def scattered(self, values: Float[Array, "*lead kept out"]) -> Float[Array, "*lead in out"]:
        """`values`, dense, at their places among zeros."""
        *lead, _, columns = values.shape
        groups = (*lead, self.shape[0] // self.m, self.n, columns)
        values, positions = values.reshape(groups), self.positions().reshape(groups)
        places = [jnp.sum(jnp.where(positions == place, values, 0), axis=-2) for place in range(self.m)]
        return jnp.stack(places, axis=-2).reshape(*lead, *self.shape).astype(self.dtype)


def index_bits(m: int) -> int:
    """Bits in which a position below m is stored: 2, 4 or 8."""
    return 2 if m <= 4 else 4 if m <= 16 else 8


@functools.partial(jax.jit, static_argnums=(1, 2))
def pack_n_of_m(weight: Float[Array, "*lead in out"], n: int, m: int) -> NMSparse:
    """A weight with at most n non-zeros in every m consecutive inputs, stored by them.

    Of a group with fewer than n non-zeros the first zeros are stored too. A weight that has more loses the later ones: check
    `n_of_m_holds` first.

    Args:
      weight: in a multiple of m.
      m: at most 256.
    """
    *lead, rows, columns = weight.shape
    groups = weight.reshape(*lead, rows // m, m, columns)
    # Non-zeros first, each part in order: a stable sort of whether a value is zero.
    order = jnp.argsort(groups == 0, axis=-2, stable=True)[..., :n, :]
    order = jnp.sort(order, axis=-2)
    kept = (*lead, rows // m * n, columns)
    values = jnp.take_along_axis(groups, order, axis=-2).reshape(kept)
    return NMSparse(values, _packed(order.reshape(kept), m), n, m, (rows, columns), weight.dtype)


def _packed(positions: Int[Array, "*lead kept out"], m: int) -> UInt8[Array, "*lead packed out"]:
    bits = index_bits(m)
    per_byte = 8 // bits
    *lead, rows, columns = positions.shape
    padded = jnp.pad(positions, [(0, 0)] * len(lead) + [(0, -rows % per_byte), (0, 0)])
    parts = padded.astype(jnp.uint8).reshape(*lead, -1, per_byte, columns)
    shifted = parts << (bits * jnp.arange(per_byte, dtype=jnp.uint8)).reshape(*(1,) * (len(lead) + 1), -1, 1)
    return jnp.sum(shifted, axis=-2, dtype=jnp.uint8)


@functools.partial(jax.jit, static_argnums=(1, 2))
def n_of_m_holds(weight: Float[Array, "*lead in out"], n: int, m: int) -> Array:
    """bool[]: whether every group of m consecutive inputs has at most n non-zeros."""
    *lead, rows, columns = weight.shape
    counts = jnp.sum(weight.reshape(*lead, rows // m, m, columns) != 0, axis=-2)
    return jnp.all(counts <= n)
