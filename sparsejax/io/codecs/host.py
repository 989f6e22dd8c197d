"""QTensors from and to arrays on the host."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax.ops.formats.packing import pack_bits, unpack_bits
from sparsejax.ops.formats.scales import QParams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.quantized_arrays import QTensor, packed


def held(
    codes: np.ndarray, scale: np.ndarray, spec: FormatSpec, dtype: Any, *,
    zero: np.ndarray | None = None, second: np.ndarray | None = None, mean: np.ndarray | None = None,
) -> QTensor:  # fmt: skip
    """The QTensor of codes [in, out] and of parameters as `ops.formats.scales.QParams` has them, in their stored types."""
    zero_, second_, mean_ = (None if part is None else jnp.asarray(part) for part in (zero, second, mean))
    parameters = QParams(jnp.asarray(scale), zero_, second_, mean_)
    return packed(jnp.asarray(codes), parameters, spec, (codes.shape[0], codes.shape[1]), dtype)


def bitstream(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8[..., bytes] of the low bits of codes, densely, lowest first (`ops.formats.packing`)."""
    return codes.astype(np.uint8) if bits == 8 else np.asarray(pack_bits(jnp.asarray(codes), bits))


def from_bitstream(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8[..., count], the inverse."""
    return stream[..., :count] if bits == 8 else np.asarray(unpack_bits(jnp.asarray(stream), bits, count, signed=False))
