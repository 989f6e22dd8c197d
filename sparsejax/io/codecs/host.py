"""QTensors from and to arrays on the host, each step compiled once per format and shape."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.ops.formats.packing import pack_bits, unpack_bits
from sparsejax.ops.formats.scales import QParams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.quantized_arrays import QTensor, packed


def held(
    codes: np.ndarray, scale: np.ndarray, spec: FormatSpec, dtype: Any, *,
    zero: np.ndarray | None = None, second: np.ndarray | None = None, mean: np.ndarray | None = None,
    group_of: np.ndarray | None = None,
) -> QTensor:  # fmt: skip
    """The QTensor of codes [in, out] and of parameters as `ops.formats.scales.QParams` has them, as stored; group_of [in]."""
    column = None if group_of is None else group_of[:, None]
    optional = (None if part is None else jnp.asarray(part) for part in (zero, second, mean, column))
    parameters = QParams(jnp.asarray(scale), *optional)
    return _packed(jnp.asarray(codes), parameters, spec, (codes.shape[0], codes.shape[1]), np.dtype(dtype))


def spread_out(tensor: QTensor) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes, one to an element, filled up where the format says so, and zeros, or None."""
    codes, zero = _unpacked(tensor)
    return np.asarray(codes), None if zero is None else np.asarray(zero)


def bitstream(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8[..., bytes] of the low bits of codes, densely, lowest first (`ops.formats.packing`)."""
    return codes.astype(np.uint8) if bits == 8 else np.asarray(_pack_bits(jnp.asarray(codes), bits))


def from_bitstream(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8[..., count], the inverse."""
    return stream[..., :count] if bits == 8 else np.asarray(_unpack_bits(jnp.asarray(stream), bits, count))


_packed = jax.jit(packed, static_argnums=(2, 3, 4))
_unpacked = jax.jit(lambda tensor: (tensor.unpacked(), tensor.qparams.zero))
_pack_bits = jax.jit(pack_bits, static_argnums=1)
_unpack_bits = jax.jit(functools.partial(unpack_bits, signed=False), static_argnums=(1, 2))
