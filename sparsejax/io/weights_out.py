"""From a model's parameters to the tensors of a published checkpoint: the name map of the import, walked the other way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from sparsejax import nnx_compat
from sparsejax.io.family import Family
from sparsejax.io.name_map import Entry, Slot, expand, parameter_slots
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Structure
from sparsejax.plugs import ConfigError


class PlannedTensor(NamedTuple):
    """A tensor of the checkpoint, what it will be, and how to get it: an item for `write_safetensors`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    produce: Callable[[], Any]


def export_tensors(
    config: ModelConfig, family: Family, structure: Structure, values: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """(published name, array) of every tensor, one layer in host memory at a time, in the types that the values have.

    Importing them again gives the same parameters bit for bit; a tied head is not repeated.

    Args:
      config: finalized.
      family: whose names the tensors get.
      structure, values: of the model; every value a plain array.
    Raises:
      ConfigError: a parameter that is held packed; it is named.
    """
    slots, entries = _mapped(config, family, structure, values)
    for one in entries:
        yield from zip(one.theirs, _tensors(one, slots, values), strict=True)


def plan_tensors(config: ModelConfig, family: Family, structure: Structure, values: dict[str, Any]) -> list[PlannedTensor]:
    """The same tensors before any is on the host, for a writer that needs all names and shapes first.

    Raises:
      ConfigError: as `export_tensors`.
    """
    slots, entries = _mapped(config, family, structure, values)
    planned = []
    for one in entries:
        saved = one.layout.save([_hollow(slots[name], values) for name in one.ours])
        for position, (name, array) in enumerate(zip(one.theirs, saved, strict=True)):
            produce = functools.partial(_tensor, one, position, slots, values)
            planned.append(PlannedTensor(name, array.shape, array.dtype, produce))
    return planned


def _mapped(
    config: ModelConfig, family: Family, structure: Structure, values: dict[str, Any]
) -> tuple[dict[str, Slot], list[Entry]]:
    plain = jax.Array | np.ndarray
    packed = [".".join(path) for path in structure.paths if not isinstance(nnx_compat.at(values, path), plain)]
    if packed:
        raise ConfigError(f"a {family.name} checkpoint holds plain arrays, but these are packed: {', '.join(packed[:8])}")
    slots = parameter_slots(nnx_compat.merge(structure, values), structure.paths)
    return slots, expand(family.entries(config), config, set(slots), family.experts(config))


def _tensors(one: Entry, slots: dict[str, Slot], values: dict[str, Any]) -> list[np.ndarray]:
    return one.layout.save([_parameter(slots[name], values) for name in one.ours])


def _tensor(one: Entry, position: int, slots: dict[str, Slot], values: dict[str, Any]) -> np.ndarray:
    return _tensors(one, slots, values)[position]


def _parameter(slot: Slot, values: dict[str, Any]) -> np.ndarray:
    """One layer's parameter on the host."""
    array = nnx_compat.at(values, slot.path)
    return np.asarray(jax.device_get(array if slot.row is None else array[slot.row]))


def _hollow(slot: Slot, values: dict[str, Any]) -> np.ndarray:
    """Shape and dtype of one layer's parameter, in the memory of one number."""
    array = nnx_compat.at(values, slot.path)
    return np.broadcast_to(np.zeros((), np.dtype(array.dtype)), array.shape if slot.row is None else array.shape[1:])
