"""What the codes of a format stand for before their scale: whole numbers, small floats, tables.

A grid encodes numbers that are already divided by their group's scale, rounding them to its points and saturating at its ends,
and decodes codes into float32. Nothing here relies on a cast's own rounding or saturation, which differ by dtype and backend
(float32 to float8_e4m3fn gives NaN above 464, to int4 truncates, to float8_e8m0fnu knows no zero: JAX 0.12 on CPU).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.ops.formats.rounding import drawn, rounded
from sparsejax.ops.formats.tables import FP4_BNB, IQ4_NL, NF4, float_values


@dataclasses.dataclass(frozen=True)
class Integers:
    """Whole numbers from `least` to `most`; codes are the numbers, int8 where `least` is negative, else uint8."""

    bits: int
    least: int
    most: int

    @property
    def greatest(self) -> float:
        return self.most

    @property
    def signed(self) -> bool:
        return self.least < 0

    def encode(self, x: Float[Array, "*shape"], rounding: str, key: Array | None, zero: Array | None = None) -> Array:
        """Codes of x; `zero` (float32, whole numbers) is added after rounding."""
        whole = rounded(x, rounding, key)
        whole = whole if zero is None else whole + zero
        return jnp.clip(whole, self.least, self.most).astype(jnp.int8 if self.signed else jnp.uint8)

    def decode(self, codes: Array) -> Float[Array, "*shape"]:
        return codes.astype(jnp.float32)

    @property
    def holds_zero(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Floats:
    """Small floats s|e|m with subnormals, that saturate.

    most_code: the code of the greatest number; what is above it (NaN, infinities) is never written, except `nan_code` for NaN.
    native: the dtype of the codes where JAX has one of eight bits; else they are uint8.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    most_code: int
    nan_code: int | None = None
    native: Any = None

    signed = False  # the sign is a bit of the code, nothing to extend

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def values(self) -> np.ndarray:
        return float_values(self.exponent_bits, self.mantissa_bits, self.bias)

    @property
    def greatest(self) -> float:
        return float(self.values[self.most_code])

    def encode(self, x: Float[Array, "*shape"], rounding: str, key: Array | None) -> Array:
        limited = jnp.clip(x, -self.greatest, self.greatest)
        exponent = jnp.maximum((_bits_of(jnp.abs(limited)) >> 23) - 127, 1 - self.bias)
        # Times a power of two, which is exact, the steps of this binade are whole numbers. A result of 2^(M+1) is the first
        # number of the next binade, and so is its code.
        steps = jnp.abs(rounded(limited * _power_of_two(self.mantissa_bits - exponent), rounding, key))
        code = ((exponent - (1 - self.bias)) << self.mantissa_bits) + steps.astype(jnp.int32)
        code = jnp.minimum(code, self.most_code) | ((_bits_of(x) < 0).astype(jnp.int32) << (self.bits - 1))
        if self.nan_code is not None:
            code = jnp.where(jnp.isnan(x), self.nan_code, code)
        codes = code.astype(jnp.uint8)
        return codes if self.native is None else jax.lax.bitcast_convert_type(codes, self.native)

    def decode(self, codes: Array) -> Float[Array, "*shape"]:
        if self.native is not None:
            return codes.astype(jnp.float32)
        magnitude = (codes & jnp.uint8(2 ** (self.bits - 1) - 1)).astype(jnp.int32)
        exponent = magnitude >> self.mantissa_bits
        mantissa = magnitude & (2**self.mantissa_bits - 1) | ((exponent > 0).astype(jnp.int32) << self.mantissa_bits)
        value = mantissa.astype(jnp.float32) * _power_of_two(jnp.maximum(exponent, 1) - self.bias - self.mantissa_bits)
        return jnp.where(codes >> (self.bits - 1) > 0, -value, value)

    @property
    def holds_zero(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Table:
    """Any numbers, `values` by code; uint8 codes.

    logarithmic: all values are positive and the nearest one is that by ratio.
    """

    bits: int
    values: tuple[float, ...]
    logarithmic: bool = False

    signed = False

    @property
    def greatest(self) -> float:
        return max(abs(value) for value in self.values)

    def encode(self, x: Float[Array, "*shape"], rounding: str, key: Array | None) -> Array:
        points, codes = (jnp.asarray(part) for part in self._ascending)
        x = jnp.clip(x, points[0], points[-1])
        method = "compare_all" if len(self.values) <= 16 else "scan"
        lower = jnp.clip(jnp.searchsorted(points, x, side="right", method=method) - 1, 0, len(points) - 2)
        low, high = points[lower], points[lower + 1]
        if self.logarithmic and rounding != "stochastic":  # whose mean is wanted among the numbers, not among their logarithms
            fraction = jnp.log(x / low) / jnp.log(high / low)
        else:
            fraction = (x - low) / (high - low)
        if rounding == "stochastic":
            return codes[lower + drawn(fraction, key)]
        up = lower % 2 == 1 if rounding == "even" else (x > 0) | (rounding == "half_up")  # where both are as near
        return codes[lower + ((fraction > 0.5) | ((fraction == 0.5) & up))]

    def decode(self, codes: Array) -> Float[Array, "*shape"]:
        return jnp.asarray(self.values, jnp.float32)[codes]

    @property
    def _ascending(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct values in order, float32, and the code of each: the first that has it."""
        values, first = np.unique(np.asarray(self.values, np.float32), return_index=True)
        return values, first.astype(np.uint8)

    @property
    def holds_zero(self) -> bool:
        return 0 in self.values


Grid = Integers | Floats | Table

TERNARY = Integers(2, -1, 1)
_TABLES = {"nf4": NF4, "fp4_bnb": FP4_BNB, "iq4_nl": IQ4_NL}
_FLOATS = {
    "fp8_e4m3": Floats(4, 3, 7, 0x7E, 0x7F, jnp.float8_e4m3fn),
    "fp8_e5m2": Floats(5, 2, 15, 0x7B, 0x7F, jnp.float8_e5m2),
    "fp6_e2m3": Floats(2, 3, 1, 0x1F),
    "fp6_e3m2": Floats(3, 2, 3, 0x1F),
    "fp4_e2m1": Floats(2, 1, 1, 0x7),
    "fp4_e1m2": Floats(1, 2, 0, 0x7),  # the grid of narrow int4
    "fp4_e3m0": Floats(3, 0, 3, 0x7),
}
_INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}
# x = 2^-q, or 2^(-q/2), for tensors that are never negative, such as attention probabilities.
_LOGARITHMS = {f"{name}_{bits}": (bits, steps) for name, steps in (("log2", 1), ("logsqrt2", 2)) for bits in range(2, 9)}

INTEGERS, LOGARITHMS = tuple(_INTEGERS), tuple(_LOGARITHMS)
ELEMENTS = (*_INTEGERS, "ternary", "binary", *_FLOATS, *_TABLES, *_LOGARITHMS)


@functools.cache
def grid_of(element: str, symmetric: str) -> Grid:
    """The grid of an element's name; `symmetric` (one of `spec.SYMMETRIC`) says which range integers have."""
    if element in _INTEGERS:
        bits = _INTEGERS[element]
        half = 2 ** (bits - 1)
        ranges = {"narrow": (1 - half, half - 1), "asym": (0, 2 * half - 1)}
        return Integers(bits, *ranges.get(symmetric, (-half, half - 1)))
    if element in _LOGARITHMS:
        bits, steps = _LOGARITHMS[element]
        return Table(bits, tuple(2.0 ** (-code / steps) for code in range(2**bits)), logarithmic=True)
    if element in _TABLES:
        return Table(4, tuple(_TABLES[element].tolist()))
    if element in _FLOATS:
        return _FLOATS[element]
    return TERNARY if element == "ternary" else Table(1, (-1.0, 1.0))


def _bits_of(x: Float[Array, "*shape"]) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _power_of_two(exponent: Array) -> Float[Array, "*shape"]:
    """2^exponent, exactly, for exponents of normal float32 numbers."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
