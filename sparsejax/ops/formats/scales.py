"""Scales as they are stored: rounded to half precision, to powers of two, to FP8, or quantized a second time."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sparsejax.ops.formats.grids import Floats, Table, grid_of
from sparsejax.ops.formats.spec import DOUBLE_BLOCK, FormatSpec
from sparsejax.ops.formats.tables import DYNAMIC_8

STORED = {"f32": jnp.float32, "f16": jnp.float16, "bf16": jnp.bfloat16}
E8M0_NAN = 255
_E4M3 = grid_of("fp8_e4m3", "narrow")
_DYNAMIC = Table(8, tuple(DYNAMIC_8.tolist()))


class QParams(NamedTuple):
    """What turns codes into numbers, in the dtypes in which it is stored; all with the array's rank.

    scale: [..., groups along axis -2, groups along axis -1]; uint8 exponents for e8m0, uint8 codes where it is quantized again.
    zero: of the same shape, or None: uint8 codes, or floats in the scale's dtype.
    second: float32, or None: G [..., 1, 1] of `two_level`, or the scales [..., 1, ceil(groups / 256)] of `double`.
    mean: float32[..., 1, 1] that `double` takes off the scales, or None.
    group_of: uint16 [..., rows, 1], the group of each row of an `indexed` format, or None.
    """

    scale: Array
    zero: Array | None = None
    second: Array | None = None
    mean: Array | None = None
    group_of: Array | None = None


def shared_exponent(magnitude: Float[Array, "*groups"], greatest: float, rule: str) -> UInt8[Array, "*groups"]:
    """The E8M0 byte e, for the scale 2^(e - 127), of groups by their largest magnitude (OCP MX 1.0, section 5.3).

    Args:
      magnitude: max |x|; 0 gives the least byte, NaN and infinity give 255, which is NaN.
      greatest: the element's greatest number.
      rule: of `spec.RULES`.
    """
    bits = jax.lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32)
    mantissa, exponent = math.frexp(greatest)  # greatest = 2 mantissa 2^(exponent - 1), 2 mantissa in [1, 2)
    own = bits >> 23
    if rule == "ceil":
        top = own + ((bits & 0x7FFFFF) > int((2 * mantissa - 1) * 2**23))
    else:
        carry = (1 << 22) - 1 + (own & 1) if rule == "rne" else 1 << 21 if rule == "round175" else 0
        top = (bits + carry) >> 23
    return jnp.where(own == 255, E8M0_NAN, jnp.clip(top - (exponent - 1), 0, 254)).astype(jnp.uint8)


def power_of_two(byte: UInt8[Array, "*groups"]) -> Float[Array, "*groups"]:
    """2^(byte - 127) in float32, NaN for 255. 2^-127 is subnormal: zero where a device flushes those."""
    exponent = byte.astype(jnp.int32)
    bits = jnp.where(exponent == 0, 1 << 22, jnp.where(exponent == E8M0_NAN, 0x7FC00000, exponent << 23))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def stored_float(scale: Float[Array, "*groups"], dtype: str) -> Array:
    """Rounded to a float dtype of `STORED`; what is finite stays so."""
    limit = float(jnp.finfo(STORED[dtype]).max)
    return jnp.where(jnp.isfinite(scale), jnp.clip(scale, -limit, limit), scale).astype(STORED[dtype])


def tensor_scale(magnitude: Float[Array, "*lead groups columns"], greatest: float) -> Float[Array, "*lead 1 1"]:
    """G of NVFP4: what brings the greatest scale of the matrix to 448, E4M3's greatest number; 1 for a matrix of zeros."""
    largest = jnp.max(magnitude, axis=(-2, -1), keepdims=True)
    scale = jnp.float32(_E4M3.greatest * greatest) / jnp.where(largest == 0, jnp.float32(_E4M3.greatest * greatest), largest)
    return jnp.minimum(scale, jnp.finfo(jnp.float32).max)


def stored_e4m3(scale: Float[Array, "*groups"]) -> Array:
    """Rounded to nearest even in FP8 E4M3, at most 448."""
    assert isinstance(_E4M3, Floats)
    return _E4M3.encode(scale, "even", None)


def doubled(scale: Float[Array, "*lead rows columns"]) -> QParams:
    """Scales quantized again, less their mean, by the dynamic 8-bit map, in blocks of 256 of the order of [out, in]."""
    mean = jnp.mean(scale, axis=(-2, -1), keepdims=True)
    flat = jnp.swapaxes(scale - mean, -1, -2).reshape(*scale.shape[:-2], -1)
    missing = -flat.shape[-1] % DOUBLE_BLOCK
    blocks = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, missing)]).reshape(*scale.shape[:-2], -1, DOUBLE_BLOCK)
    second = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    codes = _DYNAMIC.encode(blocks / jnp.where(second == 0, 1, second), "even", None)
    return QParams(_unflattened(codes, scale.shape), None, jnp.swapaxes(second, -1, -2), mean)


def _unflattened(blocks: Array, shape: tuple[int, ...]) -> Array:
    *lead, rows, columns = shape
    flat = blocks.reshape(*lead, -1)[..., : rows * columns]
    return jnp.swapaxes(flat.reshape(*lead, columns, rows), -1, -2)


def effective(qparams: QParams, spec: FormatSpec) -> Float[Array, "*lead rows columns"]:
    """The scales as float32 numbers."""
    scale, second, mean = qparams.scale, qparams.second, qparams.mean
    if spec.scale == "e8m0":
        return power_of_two(scale)
    if spec.second == "two_level":
        assert second is not None
        return scale.astype(jnp.float32) / second
    if spec.second == "double":
        assert second is not None and mean is not None
        lengths = np.full(second.shape[-1], DOUBLE_BLOCK)
        per_scale = jnp.repeat(second, lengths, axis=-1, total_repeat_length=DOUBLE_BLOCK * second.shape[-1])
        return _DYNAMIC.decode(scale) * _unflattened(per_scale[..., 0, :], scale.shape) + mean
    return scale.astype(jnp.float32)
