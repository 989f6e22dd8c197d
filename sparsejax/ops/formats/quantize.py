"""From numbers to codes and back, for every format: `qparams`, `encode`, `decode`, and `fake`, which is both.

The two trailing axes of an array are those that a `FormatSpec` speaks of; each matrix of what leads them (layers, experts) is
by itself. All of it can be traced: shapes and specs are static, and nothing depends on a value.

What cannot be represented is not hidden. A group that holds NaN or an infinity has a scale that is no finite number, and all
of it decodes to NaN; with calibrated scales only FP8 can keep a NaN. A group of zeros, or one whose scale underflows in its
storage dtype, has the scale 0 and decodes to zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.ops.formats import scales
from sparsejax.ops.formats.grids import Integers
from sparsejax.ops.formats.scales import QParams, effective
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check


class Extent(NamedTuple):
    """What the scales of groups are computed from, float32 [..., groups along -2, groups along -1].

    high: the greatest entry of a group; the largest magnitude, or their mean, of formats that need no more (`spec.statistic`).
    low: the least entry; None where it is not needed.
    """

    high: Array
    low: Array | None = None


def extent(x: Float[Array, "*lead rows columns"], spec: FormatSpec) -> Extent:
    """The extent of each group of x.

    Raises:
      ConfigError: fewer than two axes, a last group that is not full where `ragged` is `error`, or an `indexed` format.
    """
    check(x.ndim >= 2, "format", str(spec), f"acts on the last two axes of an array, this one has the shape {x.shape}")
    check(not spec.indexed, "format", str(spec), "is indexed: a solver says which rows make a group (gptq, order dynamic)")
    block = spec.block(x.shape[-2:])
    x = x.astype(jnp.float32)
    if spec.statistic != "range":
        high = _reduced(jnp.abs(x), block, "mean" if spec.statistic == "mean" else "max")
        return Extent(jnp.where(jnp.isfinite(high), high, jnp.nan))
    high, low = _reduced(x, block, "max"), _reduced(x, block, "min")
    finite = jnp.isfinite(high) & jnp.isfinite(low)
    return Extent(jnp.where(finite, high, jnp.nan), jnp.where(finite, low, jnp.nan))


def qparams(
    x: Float[Array, "*lead rows columns"],
    spec: FormatSpec,
    *,
    within: Extent | None = None,
    second: Float[Array, "*lead 1 1"] | None = None,
) -> QParams:
    """Scales and zeros of x, as they are stored.

    Args:
      x: to be quantized.
      within: the groups' extents where they are not those of x: clipped by a solver, or calibrated.
      second: G of a `two_level` format where it is calibrated.
    Raises:
      ConfigError: see `extent`; a `static` format without `within`.
    """
    check(not spec.static or within is not None, "format", str(spec), "is static: its scales come from calibration")
    return _stored(extent(x, spec) if within is None else within, spec, second)


def encode(
    x: Float[Array, "*lead rows columns"], parameters: QParams, spec: FormatSpec, *, key: Array | None = None
) -> Array:
    """Codes of x: int8, uint8, or FP8 for the elements of that name; filled up to whole groups where `ragged` is `pad`.

    Args:
      x: to be quantized.
      parameters: of `qparams`.
      key: for stochastic rounding.
    """
    rows, columns = spec.padded(x.shape[-2:])
    if (rows, columns) != x.shape[-2:]:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows - x.shape[-2]), (0, columns - x.shape[-1])])
    exact = effective(parameters, spec)
    group_of = parameters.group_of
    scale = spread(jnp.where(exact == 0, 1, exact), spec, x.shape[-2:], group_of)
    x, grid = x.astype(jnp.float32), spec.grid
    if parameters.zero is None:
        return grid.encode(x / scale, spec.rounding, key)
    zero = spread(parameters.zero.astype(jnp.float32), spec, x.shape[-2:], group_of)
    assert isinstance(grid, Integers)
    if spec.zero == "int":
        return grid.encode(x / scale, spec.rounding, key, zero)
    return grid.encode(x / scale + zero if spec.zero == "float" else (x - zero) / scale, spec.rounding, key)


def decode(
    codes: Array, parameters: QParams, spec: FormatSpec, shape: tuple[int, ...] | None = None
) -> Float[Array, "*lead rows columns"]:
    """The float32 numbers that codes stand for.

    Args:
      codes, parameters: of `encode` and `qparams`.
      shape: the trailing (rows, columns) of the array; needed where `ragged` is `pad`.
    """
    filled, group_of = codes.shape[-2:], parameters.group_of
    scale, numbers = spread(effective(parameters, spec), spec, filled, group_of), spec.grid.decode(codes)
    if parameters.zero is None:
        numbers = numbers * scale
    else:
        zero = spread(parameters.zero.astype(jnp.float32), spec, filled, group_of)
        numbers = numbers * scale + zero if spec.zero == "min" else (numbers - zero) * scale
    return numbers if shape is None or shape == filled else numbers[..., : shape[0], : shape[1]]


def quantize(
    x: Float[Array, "*lead rows columns"],
    spec: FormatSpec,
    *,
    parameters: QParams | None = None,
    within: Extent | None = None,
    second: Float[Array, "*lead 1 1"] | None = None,
    key: Array | None = None,
) -> tuple[Array, QParams]:
    """(codes, parameters) of x; `parameters` where they are given, else those of `qparams(x, spec, within=, second=)`."""
    if parameters is None:
        check(not spec.static or within is not None, "format", str(spec), "is static: its scales come from calibration")
        found = extent(x, spec) if within is None else within
        parameters = _stored(found, spec, second)
        if spec.codes == "exact":
            return encode(x, _exact(found, spec), spec, key=key), parameters
    return encode(x, parameters, spec, key=key), parameters


def fake(
    x: Float[Array, "*lead rows columns"],
    spec: FormatSpec,
    *,
    parameters: QParams | None = None,
    within: Extent | None = None,
    key: Array | None = None,
) -> Float[Array, "*lead rows columns"]:
    """x rounded to the format, in its own dtype. The gradient goes straight through: dL/dx = dL/dx_hat."""
    fixed = jax.lax.stop_gradient(x)
    codes, parameters = quantize(fixed, spec, parameters=parameters, within=within, key=key)
    return _straight_through(x, decode(codes, parameters, spec, x.shape[-2:]).astype(x.dtype))


@jax.custom_vjp
def _straight_through(x: Array, rounded: Array) -> Array:
    return rounded


_straight_through.defvjp(lambda x, rounded: (rounded, None), lambda _, g: (g, None))


def _exact(found: Extent, spec: FormatSpec) -> QParams:
    """Scales and zeros in float32, before they are rounded for storage."""
    high, low, grid = found.high, found.low, spec.grid
    # Times the reciprocal: a division by a constant is compiled to either, so eager and jit would differ in the last bit.
    if spec.symmetric == "signed_max":
        assert low is not None and isinstance(grid, Integers)
        return QParams(jnp.where(-low > high, low, high) * jnp.float32(1 / grid.least))
    if spec.symmetric != "asym":
        steps = grid.greatest + 0.5 if spec.symmetric == "full15" else 1.0 if spec.statistic == "mean" else grid.greatest
        return QParams(high * jnp.float32(1 / steps))
    assert low is not None
    if spec.zero != "min":
        # The real zero must be a code; a float zero needs the range only where it would have no width.
        held = low == high if spec.zero == "float" else True
        low, high = jnp.where(held, jnp.minimum(low, 0), low), jnp.where(held, jnp.maximum(high, 0), high)
    return QParams((high - low) * jnp.float32(1 / grid.greatest), low)


def _stored(found: Extent, spec: FormatSpec, second: Array | None = None) -> QParams:
    grid = spec.grid
    if spec.scale == "e8m0":
        return QParams(scales.shared_exponent(found.high, grid.greatest, spec.rule))
    if spec.second == "two_level":
        second = scales.tensor_scale(found.high, grid.greatest) if second is None else second
        return QParams(scales.stored_e4m3(found.high * second * jnp.float32(1 / grid.greatest)), None, second)
    exact = _exact(found, spec)
    if spec.scale == "e4m3":
        return QParams(scales.stored_e4m3(exact.scale))
    stored = scales.doubled(exact.scale) if spec.second == "double" else QParams(scales.stored_float(exact.scale, spec.scale))
    if exact.zero is None:
        return stored
    if spec.zero == "min":
        return stored._replace(zero=scales.stored_float(exact.zero, spec.scale))
    # By the scale as it is stored: half a step of the codes would be lost to its rounding.
    scale = effective(stored, spec)
    zero = -exact.zero / jnp.where(scale == 0, 1, scale)
    if spec.zero == "float":
        return stored._replace(zero=scales.stored_float(zero, spec.scale))
    return stored._replace(zero=jnp.clip(jnp.round(zero), 0, grid.greatest).astype(jnp.uint8))


def _reduced(x: Array, block: tuple[int, int], how: str) -> Array:
    """The max, min or mean of each block, [..., groups, groups]; of the true entries where the last blocks are not full."""
    sizes = x.shape[-2:]
    reduce: Any = {"max": jnp.max, "min": jnp.min, "mean": jnp.sum}[how]
    if all(size in (1, length) for size, length in zip(block, sizes, strict=True)):
        axes = tuple(axis for axis, size, length in zip((-2, -1), block, sizes, strict=True) if size == length)
        found = reduce(x, axis=axes, keepdims=True)
    else:
        padding = [(0, -length % size) for length, size in zip(sizes, block, strict=True)]
        if any(after for _, after in padding):
            # The edge is an entry of the last block itself, so its extremes stay what they are.
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + padding, mode="constant" if how == "mean" else "edge")
        rows, columns = x.shape[-2] // block[0], x.shape[-1] // block[1]
        found = reduce(x.reshape(*x.shape[:-2], rows, block[0], columns, block[1]), axis=(-3, -1))
    if how != "mean":
        return found
    full = [np.minimum(size, length - size * np.arange(-(-length // size))) for length, size in zip(sizes, block, strict=True)]
    counts = np.outer(*full).astype(np.float32)
    return found / jnp.asarray(counts).reshape((1,) * (found.ndim - 2) + counts.shape)


def spread(groups: Array, spec: FormatSpec, shape: tuple[int, ...], group_of: Array | None = None) -> Array:
    """A value per group as one per entry of a matrix of this shape, or as an array that broadcasts to that.

    Args:
      groups: [..., groups along -2, groups along -1], e.g. `scales.effective`.
      shape: the trailing (rows, columns).
      group_of: of `QParams`, for an `indexed` format; a row of a group that there is not becomes NaN.
    """
    if spec.indexed:
        assert group_of is not None
        return jnp.take_along_axis(groups, group_of.astype(jnp.int32), axis=-2)
    for axis, size, length in zip((-2, -1), spec.block(shape), shape, strict=True):
        if groups.shape[axis] > 1 and size > 1:
            groups = jax.lax.slice_in_dim(jnp.repeat(groups, size, axis=axis), 0, length, axis=axis)
    return groups
