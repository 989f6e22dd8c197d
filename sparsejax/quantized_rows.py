"""A QTensor [in, out] as `sparse_gemv` reads it: row by row, in its packed form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.sparse_gemv.rows import Lanes, Rows
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

    def laid_out(shared: Float[Array, "1 groups"]) -> list[Float[Array, "1 n"]]:
        """Numbers of groups of columns by lane, as `read` has its numbers."""
        every = jnp.broadcast_to(jnp.repeat(shared[0], breadth)[:columns], columns)
        filled = jnp.pad(every, (0, width[0] * width[1] - columns))
        return [filled[None, lane :: width[0]] for lane in range(width[0])]

    def finish(g: Any, total: Lanes, weights: Float[Array, " B"]) -> Lanes:
        own = parameters._replace(scale=at(parameters.scale, g))
        scales = laid_out(effective(own, spec) if whole is None else at(whole, g))
        if parameters.zero is None:
            return tuple(lane * scale for lane, scale in zip(total, scales, strict=True))
        zeros = [zero * weights[:, None] for zero in laid_out(at(parameters.zero, g).astype(jnp.float32))]
        ordered = zip(total, scales, zeros, strict=True)
        if spec.zero == "min":
            return tuple(lane * scale + zero for lane, scale, zero in ordered)
        return tuple((lane - zero) * scale for lane, scale, zero in ordered)

    together = 1 if spec.indexed else min(height, features)
    return Rows(weight.shape, together, width, lambda k: tuple(map(spec.grid.decode, read(k))), finish, join(outputs))


def integer_rows_of(weight: QTensor) -> Rows:
    """The codes of a QTensor whose format multiplies as integers, as int32; scales are left to the caller."""
    read, width = _reader(weight)
    return Rows(weight.shape, weight.shape[0], width, lambda k: tuple(lane.astype(jnp.int32) for lane in read(k)),
                lambda g, total, weights: total, join(weight.shape[1]))  # fmt: skip


def join(outputs: int) -> Callable[[Lanes], Array]:
    """[B, n] by lane -> [B, outputs]."""
    return partial(in_order, count=outputs)


def _reader(weight: QTensor) -> tuple[Callable[[Any], list[Array]], tuple[int, int]]:
    """(k -> the codes of row k by lane, (lanes, codes of each))."""
    spec = weight.spec

    def lanes(packed: Array) -> list[Array]:
        if spec.element == "ternary":
            return trit_lanes(packed)
        return [packed] if spec.bits == 8 else bit_lanes(packed, spec.bits, spec.grid.signed)

    shapes = jax.eval_shape(lanes, jax.ShapeDtypeStruct(weight.codes.shape[-1:], weight.codes.dtype))
    return lambda k: lanes(lax.dynamic_index_in_dim(weight.codes, k, keepdims=False)), (len(shapes), shapes[0].shape[0])
