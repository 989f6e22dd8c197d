"""Pieces of work as flat arrays that numpy's files hold: QTensors taken apart, small floats as their bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.quantized_arrays import QTensor

# What stands between a name, the part of a QTensor, and the dtype of an array that is kept as bits.
_PART, _BITS = "//", "@@"
_STATIC = "static"


def flattened(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays and QTensors by name as plain arrays; `restored` is the way back, bit for bit."""
    flat: dict[str, np.ndarray] = {}
    for name, value in found.items():
        if not isinstance(value, QTensor):
            flat |= _bits(name, value)
            continue
        static = [str(value.spec), *map(str, value.shape), str(jnp.dtype(value.dtype))]
        flat[f"{name}{_PART}{_STATIC}"] = np.array(static)
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            if hasattr(part, "dtype") and hasattr(part, "shape"):
                flat |= _bits(f"{name}{_PART}{field.name}", part)
    return flat


def restored(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What `flattened` was given; arrays of a QTensor are on the device."""
    found: dict[str, Any] = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for stored, array in flat.items():
        named, _, dtype = stored.partition(_BITS)
        array = array.view(jnp.dtype(dtype)) if dtype else array
        name, _, part = named.partition(_PART)
        if part:
            parts.setdefault(name, {})[part] = array
            found[name] = None  # keeps its place
        else:
            found[name] = array
    for name, arrays in parts.items():
        spec, rows, columns, dtype = arrays.pop(_STATIC).tolist()
        kept: dict[str, Any] = {part: jnp.asarray(array) for part, array in arrays.items()}
        shape = (int(rows), int(columns))
        found[name] = QTensor(spec=FormatSpec.parse(spec), shape=shape, dtype=jnp.dtype(dtype), **kept)
    return found


def _bits(name: str, value: Any) -> dict[str, np.ndarray]:
    """One array by name; numpy's files forget dtypes that are not numpy's own (bfloat16, float8)."""
    array = np.asarray(value)
    if array.dtype.isbuiltin == 1:
        return {name: array}
    return {f"{name}{_BITS}{array.dtype}": array.view(f"u{array.dtype.itemsize}")}
