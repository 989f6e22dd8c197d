"""Which parameters a run trains: the others are neither differentiated nor seen by the optimizer, and are saved once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import nnx_compat
from sparsejax.context import site_matches
from sparsejax.io.name_map import parameter_slots
from sparsejax.nnx_compat import ROLES, Structure, Weight
from sparsejax.plugs import check, nearest


@dataclasses.dataclass(frozen=True)
class Partition:
    """The structure of a model cut in two; the maps and annotations of each speak of its own parameters alone.

    Fields:
      trained: differentiated, in float32.
      frozen: the rest.
    """

    trained: Structure
    frozen: Structure


def partition(structure: Structure, values: dict[str, Any], train: Sequence[str] = ()) -> Partition:
    """The parameters that `train` selects, and the others. What is fitted or packed is never trained.

    Args:
      structure: of the model.
      values: of its parameters, or their shapes.
      train: roles, or globs of parameter names as in `blocks.*.mlp.up.kernel`; () selects all.
    Raises:
      ConfigError: an entry that selects nothing, or some of the layers that are stacked in one array.
    """
    names = _names_by_path(structure, values)
    can_train = {path for path, weight in _weights(structure) if _is_trainable(weight, nnx_compat.at(values, path))}
    chosen = set(can_train) if not train else set()
    for index, entry in enumerate(train):
        field = f"optimizer.train[{index}]"
        selected = {path for path, weight in _weights(structure) if _selects(entry, field, weight, names[path])}
        check(selected, field, entry, f"selects no parameter of this model.{_hint(entry, names)}")
        check(selected & can_train, field, entry, "selects only what is fitted or packed, which has no gradient")
        chosen |= selected & can_train
    paths = structure.paths
    return Partition(_only(structure, [path in chosen for path in paths]), _only(structure, [p not in chosen for p in paths]))


def joined(*trees: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts of different parameters as one."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            both = key in result and isinstance(value, dict)
            result[key] = joined(result[key], value) if both else value
    return result


def _weights(structure: Structure) -> list[tuple[tuple[str, ...], Weight]]:
    return list(zip(structure.paths, structure.variables, strict=True))


def _names_by_path(structure: Structure, values: dict[str, Any]) -> dict[tuple[str, ...], list[str]]:
    names: dict[tuple[str, ...], list[str]] = {path: [] for path in structure.paths}
    for name, slot in parameter_slots(nnx_compat.merge(structure, values), structure.paths).items():
        names[slot.path].append(name)
    return names


def _is_trainable(weight: Weight, value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    plain = len(leaves) == 1 and leaves[0] is value
    return plain and jnp.issubdtype(value.dtype, jnp.floating) and weight.role != "fitted"


def _selects(entry: str, field: str, weight: Weight, names: list[str]) -> bool:
    if entry in ROLES:
        return weight.role == entry
    matched = [name for name in names if site_matches(entry, name)]
    check(len(matched) in (0, len(names)), field, entry,
          f"selects {len(matched)} of {len(names)} layers that lie in one array, e.g. not "
          f"{next((n for n in names if n not in matched), '')}; select all of them, or set model.scan = False")
    return bool(matched)


def _hint(entry: str, names: dict[tuple[str, ...], list[str]]) -> str:
    every = [name for group in names.values() for name in group]
    return nearest(entry, [*ROLES, *every]) or f" Roles are {', '.join(ROLES)}; a parameter is called {every[-1]!r}."


def _only(structure: Structure, kept: list[bool]) -> Structure:
    pairs = [pair for pair, keep in zip(_weights(structure), kept, strict=True) if keep]
    return Structure(None, tuple(path for path, _ in pairs), tuple(weight for _, weight in pairs))
