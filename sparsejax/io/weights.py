"""From named tensors to a model's parameters, each number straight into its place on its device.

Parameters of a scanned stack are one array over layers. Its buffers are filled layer by layer, as each tensor is read from
the file, handed to the devices, and dropped before the next: beside the model there is never more than its largest array.
"""

from __future__ import annotations

import collections
import fnmatch
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from sparsejax import nnx_compat
from sparsejax.io import packed_weights
from sparsejax.io.codecs.store import PackedSource
from sparsejax.io.family import Family
from sparsejax.io.name_map import Entry, Slot, Stacked, expand, parameter_slots
from sparsejax.io.tensors import TensorInfo, TensorSource
from sparsejax.models.config import ModelConfig
from sparsejax.models.transformer import abstract_transformer
from sparsejax.nnx_compat import Structure, held_in
from sparsejax.parallel import rules
from sparsejax.plugs import ConfigError, check

Path = tuple[str, ...]
_LISTED = 12  # names in one message


def load_values(
    config: ModelConfig, family: Family, source: TensorSource, *, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[Structure, dict[str, Any]]:
    """The structure and parameters of a published checkpoint.

    Args:
      config: finalized, `family.to_config`'s.
      family: whose names the tensors have.
      source: the checkpoint; maps of a `PackedSource` become QTensors.
      dtype: of matrices, embeddings and biases, see `nnx_compat.held_in`; norms, scales and routers are float32.
      mesh: where the parameters go, by the rules of `sparsejax.parallel`; None: the default device.
    Raises:
      ConfigError: tensors that are missing, that nothing reads, of a wrong shape or no float type, that hold NaN, or a tied
        head that differs from the embedding, quantized maps that no QTensor can hold; all of a kind are listed by name.
    """
    layers, stored = config.num_layers + config.encoder_layers, len(source.tensors)
    check(layers <= stored, f"{source.path}: layers", layers, f"more than the {stored} tensors of the file")
    structure, shapes = abstract_transformer(config)
    slots = parameter_slots(nnx_compat.merge(structure, shapes), structure.paths)
    entries = expand(family.entries(config), config, set(slots), family.experts(config))
    names = Names(family, source)
    check_names(names, entries)
    check_shapes(names, entries, slots, shapes)
    packed = {name for one in entries for name in one.theirs if names.is_packed(name)}
    names.fail("quantized maps that cannot be held as they are stored", packed_weights.misplaced(entries, slots, packed))
    filler = _Filler(structure, shapes, dtype, config.dtype, mesh)
    for group in _groups(entries, slots, shapes):
        filler.fill(group, slots, names)
    _check_tied(family, names, entries)
    return structure, filler.values


def input_rules(config: ModelConfig, family: Family, source: TensorSource) -> tuple[str, ...]:
    """Rules of `model.inputs` for the maps of a checkpoint whose activations are quantized; none of most."""
    if not isinstance(source, PackedSource):
        return ()
    structure, shapes = abstract_transformer(config)
    slots = parameter_slots(nnx_compat.merge(structure, shapes), structure.paths)
    names = Names(family, source)
    entries = expand(family.entries(config), config, set(slots), family.experts(config))
    packed = [name for one in entries for name in one.theirs if names.is_packed(name)]
    return packed_weights.activation_rules(entries, {name: source.activation(names.stored[name]) for name in packed})


class Names:
    """A source under the names of the family's full architecture: the base model alone leaves a prefix out."""

    def __init__(self, family: Family, source: TensorSource):
        self.source, self.family = source, family
        renamed = {name: self._renamed(name) for name in source.tensors}
        bare = family.prefix and not any(name.startswith(family.prefix) for name in renamed.values())
        self.stored = {f"{family.prefix if bare else ''}{name}": stored for stored, name in renamed.items()}
        counts = collections.Counter(renamed.values())
        twice = [stored for stored, name in renamed.items() if counts[name] > 1]
        self.fail("tensors under an old and a new name", twice)

    def _renamed(self, name: str) -> str:
        for theirs, ours in self.family.renamed:
            if theirs.startswith("."):
                if name.endswith(theirs):
                    return f"{name.removesuffix(theirs)}{ours}"
            elif name.startswith(theirs):
                return f"{ours}{name.removeprefix(theirs)}"
        return name

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def info(self, name: str) -> TensorInfo:
        return self.source.tensors[self.stored[name]]

    def read(self, name: str) -> np.ndarray:
        return self.source.read(self.stored[name])

    def is_packed(self, name: str) -> bool:
        return isinstance(self.source, PackedSource) and self.source.is_packed(self.stored.get(name, ""))

    def packed(self, name: str, dtype: np.dtype) -> Any:
        """The QTensor [in, out] of a quantized map."""
        assert isinstance(self.source, PackedSource)
        return self.source.packed(self.stored[name], dtype)

    def without(self, names: Iterable[str]) -> list[str]:
        """Stored names beyond these, the family's ignored ones, and the biases of zeros that AutoGPTQ adds to every map."""
        known, ignored = set(names), self.family.ignored
        extra = {full: stored for full, stored in self.stored.items() if full not in known and not self._is_empty_bias(full)}
        return [stored for full, stored in extra.items() if not any(fnmatch.fnmatchcase(full, glob) for glob in ignored)]

    def _is_empty_bias(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return leaf == "bias" and self.is_packed(f"{module}.weight") and not self.read(name).any()

    def fail(self, problem: str, names: Sequence[str]) -> None:
        """Raise a ConfigError that lists the names, if there are any."""
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            raise ConfigError(f"{self.source.path}: {problem}: {', '.join(list(names)[:_LISTED])}{more}")


def check_names(names: Names, entries: Sequence[Entry]) -> None:
    """Every tensor that the model needs is there, and nothing else."""
    needed = [name for one in entries for name in one.theirs if not one.optional]
    names.fail("tensors that the model needs are missing", [name for name in needed if name not in names])
    known = {name for one in entries for name in one.theirs}
    known |= {theirs for ours, theirs in names.family.tied if any(ours in one.ours for one in entries)}
    names.fail(f"tensors that no part of a {names.family.name} model reads", sorted(names.without(known)))


def check_shapes(names: Names, entries: Sequence[Entry], slots: dict[str, Slot], shapes: dict[str, Any]) -> None:
    """Every tensor has a float type and the shape that its place needs; decided without reading any."""
    wrong = []
    for one in entries:
        if not present(one, names):
            continue
        infos = [names.info(name) for name in one.theirs]
        wrong += [
            f"{name} is {info.dtype}, a float type is needed"
            for name, info in zip(one.theirs, infos, strict=True)
            if not jax.numpy.issubdtype(info.dtype, jax.numpy.floating)
        ]
        needed = [parameter_shape(name, slots, shapes) for name in one.ours]
        try:
            found = [array.shape for array in one.layout.load([_hollow(info.shape) for info in infos])]
        except ValueError:
            found = []
        if found != needed:
            given = ", ".join(f"{name} {list(info.shape)}" for name, info in zip(one.theirs[:2], infos, strict=False))
            wrong.append(f"{given} for {', '.join(f'{n} {list(s)}' for n, s in zip(one.ours, needed, strict=True))}")
    names.fail("tensors of a wrong shape or type", wrong)


def present(one: Entry, names: Names) -> bool:
    """Whether an entry's tensors are stored; only an optional one's may not be."""
    return not one.optional or all(name in names for name in one.theirs)


def parameter_shape(name: str, slots: dict[str, Slot], shapes: dict[str, Any]) -> tuple[int, ...]:
    """Shape of one layer's parameter."""
    shape = nnx_compat.at(shapes, slots[name].path).shape
    return shape if slots[name].row is None else shape[1:]


def _hollow(shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape in one byte of memory."""
    return np.broadcast_to(np.zeros((), np.int8), shape)


def _groups(entries: Sequence[Entry], slots: dict[str, Slot], shapes: dict[str, Any]) -> Iterator[list[Entry]]:
    """Entries by the arrays that they fill together, largest first, so that buffers stand beside few finished arrays."""
    group_of: dict[Path, set[Path]] = {}
    for one in entries:
        joined = set().union(*(group_of.get(slots[name].path, {slots[name].path}) for name in one.ours))
        group_of.update(dict.fromkeys(joined, joined))
    by_group: dict[frozenset[Path], list[Entry]] = {}
    for one in entries:
        by_group.setdefault(frozenset(group_of[slots[one.ours[0]].path]), []).append(one)

    def size(paths: frozenset[Path]) -> int:
        return sum(nnx_compat.at(shapes, path).size for path in paths)

    for paths in sorted(by_group, key=size, reverse=True):
        yield by_group[paths]


class _Filler:
    """Fills arrays shard by shard in host memory and hands them to their devices."""

    def __init__(self, structure: Structure, shapes: dict[str, Any], dtype: str, computed: str, mesh: Mesh | None):
        self.shapes, self.mesh = shapes, mesh
        self.weights = dict(zip(structure.paths, structure.variables, strict=True))
        self.dtype, self.computed = dtype, np.dtype(jax.numpy.dtype(computed))
        self.values: dict[str, Any] = {}

    def fill(self, group: list[Entry], slots: dict[str, Slot], names: Names) -> None:
        if any(names.is_packed(name) for one in group for name in one.theirs):
            self._fill_packed(group, slots, names)
            return
        leaves = {slots[name].path: _Leaf(*self._place(slots[name].path)) for one in group for name in one.ours}
        for one in group:
            if present(one, names):
                arrays = one.layout.load([names.read(name) for name in one.theirs])
            else:
                arrays = [np.asarray(one.default, np.float32)] * len(one.ours)
            for name, array in zip(one.ours, arrays, strict=True):
                bad = leaves[slots[name].path].write(array, slots[name].row)
                names.fail("NaN in", list(one.theirs) if bad else [])
        for path, leaf in leaves.items():
            nnx_compat.put(self.values, path, leaf.finish())

    def _fill_packed(self, group: list[Entry], slots: dict[str, Slot], names: Names) -> None:
        """One parameter, all of whose layers are quantized."""
        rows = {}
        for one in group:
            rows[slots[one.ours[0]].row] = tensors = [names.packed(name, self.computed) for name in one.theirs]
            holding = zip(one.theirs, map(packed_weights.holds_nan, tensors), strict=True)
            names.fail("NaN in", [name for name, bad in holding if bad])
        whole = packed_weights.joined(rows, experts=isinstance(group[0].layout, Stacked))
        theirs = [name for one in group for name in one.theirs]
        names.fail("maps of one stack in formats that differ", theirs if whole is None else [])
        path = slots[group[0].ours[0]].path
        nnx_compat.put(self.values, path, jax.tree.map(functools.partial(self._sharded, self.weights[path].axes), whole))

    def _sharded(self, axes: Any, part: jax.Array) -> jax.Array:
        if self.mesh is None:
            return part
        return jax.device_put(part, jax.NamedSharding(self.mesh, rules.spec_for(axes, part.shape, self.mesh)))

    def _place(self, path: Path) -> tuple[tuple[int, ...], np.dtype, Sharding]:
        weight, shape = self.weights[path], nnx_compat.at(self.shapes, path).shape
        dtype = np.dtype(jax.numpy.dtype(held_in(weight.role, self.dtype)))
        if self.mesh is None:
            return shape, dtype, jax.numpy.zeros(()).sharding
        return shape, dtype, jax.NamedSharding(self.mesh, rules.spec_for(weight.axes, shape, self.mesh))


class _Leaf:
    """One array in the making: a host buffer per distinct shard of this process."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding):
        self.shape, self.sharding = shape, sharding
        self.buffers: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        for index in sharding.addressable_devices_indices_map(shape).values():
            bounds = _bounds(index, shape)
            if bounds not in self.buffers:
                self.buffers[bounds] = np.empty([stop - start for start, stop in bounds], dtype)

    def write(self, array: np.ndarray, row: int | None) -> bool:
        """Put an array, or its part, where it belongs; whether NaN was among it."""
        nan = False
        for bounds, buffer in self.buffers.items():
            target, cut = buffer, bounds
            if row is not None:
                (start, stop), cut = bounds[0], bounds[1:]
                if not start <= row < stop:
                    continue
                target = buffer[row - start]
            target[...] = array[tuple(slice(*edges) for edges in cut)] if np.ndim(array) else array
            nan = nan or bool(np.isnan(target).any())
        return nan

    def finish(self) -> jax.Array:
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self.buffers[_bounds(index, self.shape)])


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(one.indices(size)[:2] for one, size in zip(index or (), shape, strict=True))


def _check_tied(family: Family, names: Names, entries: Sequence[Entry]) -> None:
    stored = {ours: one.theirs[0] for one in entries for ours in one.ours}
    own = {theirs for one in entries for theirs in one.theirs}
    differing = [
        f"{head} and {stored[ours]}"
        for ours, head in family.tied
        if head in names and head not in own and ours in stored
        if not np.array_equal(names.read(head), names.read(stored[ours]))
    ]
    names.fail("the config ties these tensors, but they differ", differing)
