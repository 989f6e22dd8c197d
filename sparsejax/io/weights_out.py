"""From a model's parameters to the tensors of a published checkpoint: the name map of the import, walked the other way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from sparsejax import nnx_compat
from sparsejax.io.codecs.store import Store
from sparsejax.io.family import Family
from sparsejax.io.name_map import Entry, Slot, expand, parameter_slots
from sparsejax.io.packed_weights import LAYOUTS, published_kernels
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Structure
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError, check
from sparsejax.quantized_arrays import QTensor


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


def plan_tensors(
    config: ModelConfig, family: Family, structure: Structure, values: dict[str, Any], store: Store | None = None
) -> list[PlannedTensor]:
    """The same tensors before any is on the host, for a writer that needs all names and shapes first.

    Args:
      config, family, structure, values: as in `export_tensors`.
      store: of the kernels that are QTensors. All are encoded once here, so that what it cannot hold is told before anything is
        written, and once more when their turn comes.
    Raises:
      ConfigError: as `export_tensors`, but for QTensors where there is a store; what that refuses.
    """
    slots, entries = _mapped(config, family, structure, values, (QTensor,) if store else ())
    planned: list[PlannedTensor] = []
    for one in entries:
        if store is not None and _is_quantized(one, slots, values):
            planned += _planned_maps(one, slots, values, store)
            continue
        saved = one.layout.save([_hollow(slots[name], values) for name in one.ours])
        for position, (name, array) in enumerate(zip(one.theirs, saved, strict=True)):
            produce = functools.partial(_tensor, one, position, slots, values)
            planned.append(PlannedTensor(name, array.shape, array.dtype, produce))
    return planned


def quantized_maps(
    config: ModelConfig, family: Family, structure: Structure, values: dict[str, Any]
) -> tuple[dict[str, FormatSpec], tuple[str, ...]]:
    """Published names of the maps whose kernels are QTensors, with their formats, and of all other maps.

    Raises:
      ConfigError: a QTensor of which a published tensor holds several or parts, or a parameter that is packed otherwise.
    """
    slots, entries = _mapped(config, family, structure, values, (QTensor,))
    specs: dict[str, FormatSpec] = {}
    plain = [head.removesuffix(".weight") for ours, head in family.tied if config.tied_embeddings]
    for one in entries:
        modules = [name.removesuffix(".weight") for name in one.theirs if name.endswith(".weight")]
        if _is_quantized(one, slots, values):
            rule = f"{one.theirs[0]} holds several of them, or parts; allowed are maps that are a tensor of their own"
            check(one.layout in LAYOUTS, "quantized maps", ", ".join(one.ours), rule)
            specs |= dict.fromkeys(modules, nnx_compat.at(values, slots[one.ours[0]].path).spec)
        elif one.layout in LAYOUTS:
            plain += modules
    return specs, tuple(plain)


def _is_quantized(one: Entry, slots: dict[str, Slot], values: dict[str, Any]) -> bool:
    return any(isinstance(nnx_compat.at(values, slots[name].path), QTensor) for name in one.ours)


def _planned_maps(one: Entry, slots: dict[str, Slot], values: dict[str, Any], store: Store) -> Iterator[PlannedTensor]:
    for name, kernel in published_kernels(one, slots[one.ours[0]], values).items():
        module = name.removesuffix(".weight")
        for suffix, array in store.encode(module, kernel).items():
            produce = functools.partial(_part, one, name, suffix, slots, values, store)
            yield PlannedTensor(f"{module}.{suffix}", array.shape, array.dtype, produce)


def _part(one: Entry, name: str, suffix: str, slots: dict[str, Slot], values: dict[str, Any], store: Store) -> np.ndarray:
    kernel = published_kernels(one, slots[one.ours[0]], values)[name]
    return store.encode(name.removesuffix(".weight"), kernel)[suffix]


def _mapped(
    config: ModelConfig, family: Family, structure: Structure, values: dict[str, Any], packed_types: tuple[type, ...] = ()
) -> tuple[dict[str, Slot], list[Entry]]:
    found = {".".join(path): nnx_compat.at(values, path) for path in structure.paths}
    packed = [name for name, value in found.items() if not isinstance(value, (jax.Array, np.ndarray, *packed_types))]
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
