"""A QTensor [in, out] as `sparse_gemv` reads it: row by row, in its packed form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.sparse_gemv.rows import Rows
from sparsejax.ops.formats.packing import bit_lanes, in_order, trit_lanes
from sparsejax.ops.formats.scales import effective
from sparsejax.quantized_arrays import QTensor


def rows_of(weight: QTensor) -> Rows:
    """The rows of a QTensor of two axes; what they stand for is `dequantize`'s up to the order of float32 operations.

    Scales and zeros are applied to the sums of the rows that share them: sum x_k (q_k - z) s = (sum x_k q_k - z sum x_k) s.
    Rows of an `indexed` format, whose groups are no neighbours, are taken one at a time.
    """
    spec, (features, outputs) = weight.spec, weight.shape
    height, breadth = spec.block(weight.shape)
    columns = spec.padded(weight.shape)[1]
    parameters = weight.qparams
    whole = effective(parameters, spec) if spec.second == "double" else None  # counted in blocks across rows

    read, width = _reader(weight)

    def at(array: Array, g: Any) -> Array:
        if spec.indexed:
            g = parameters.group_of[g, 0].astype(jnp.int32)  # type: ignore[index]
        return lax.dynamic_index_in_dim(array, g, keepdims=True)

    def laid_out(shared: Float[Array, "1 groups"]) -> Float[Array, "lanes n"]:
        """Numbers of groups of columns by lane, as `read` has its numbers."""
        every = jnp.broadcast_to(jnp.repeat(shared[0], breadth)[:columns], columns)
        filled = jnp.pad(every, (0, width[0] * width[1] - columns))
        return filled.reshape(width[1], width[0]).T

    def finish(g: Any, total: Float[Array, "B lanes n"], weights: Float[Array, " B"]) -> Float[Array, "B lanes n"]:
        own = parameters._replace(scale=at(parameters.scale, g))
        scale = laid_out(effective(own, spec) if whole is None else at(whole, g))[None]
        if parameters.zero is None:
            return total * scale
        zero = laid_out(at(parameters.zero, g).astype(jnp.float32))[None] * weights[:, None, None]
        return total * scale + zero if spec.zero == "min" else (total - zero) * scale

    together = 1 if spec.indexed else min(height, features)
    return Rows(weight.shape, together, width, lambda k: spec.grid.decode(read(k)), finish, join(outputs))


def integer_rows_of(weight: QTensor) -> Rows:
    """The codes of a QTensor whose format multiplies as integers, as int32; scales are left to the caller."""
    read, width = _reader(weight)
    as_integers = partial(jnp.asarray, dtype=jnp.int32)
    return Rows(weight.shape, weight.shape[0], width, lambda k: as_integers(read(k)), lambda g, total, weights: total,
                join(weight.shape[1]))  # fmt: skip


def join(outputs: int) -> Callable[[Array], Array]:
    """[..., lanes, n] -> [..., outputs]."""
    return partial(in_order, count=outputs)


def _reader(weight: QTensor) -> tuple[Callable[[Any], Array], tuple[int, int]]:
    """(k -> the codes of row k [lanes, n], their shape)."""
    spec = weight.spec

    def lanes(packed: Array) -> Array:
        if spec.element == "ternary":
            return trit_lanes(packed)
        return packed[None] if spec.bits == 8 else bit_lanes(packed, spec.bits, spec.grid.signed)

    rows, columns = jax.eval_shape(lanes, jax.ShapeDtypeStruct(weight.codes.shape[-1:], weight.codes.dtype)).shape
    return lambda k: lanes(lax.dynamic_index_in_dim(weight.codes, k, keepdims=False)), (rows, columns)
