"""From logical axis names to shardings: one table of rules, read for parameters, activations, batches and optimizer state.

Every weight names the logical axes of its trailing dimensions (`("embed", "mlp")`); a rule names the mesh axes that a logical
axis is cut along. Nothing here computes: shapes go in, PartitionSpecs come out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sparsejax.parallel.config import MeshConfig
from sparsejax.plugs import ConfigError, check_choice

Rules = Mapping[str, tuple[str, ...]]
Axes = tuple[str | None, ...]

# batch: `expert` devices hold different experts but no other parameter of their own, so that outside of the experts they
# work as further data-parallel devices; leaving `expert` out would make them repeat each other's attention.
# embed -> fsdp cuts every matrix once; the other dimension of a matrix is the one tensor parallelism needs, so the two compose.
# embed_activation stays whole: `batch` already uses fsdp, and a residual stream cut along D would need a gather per layer.
RULES: Rules = MappingProxyType({
    "batch": ("data", "fsdp", "expert"),
    "length": ("sequence",),
    "embed_activation": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "layers": (),
    "position": (),
    "patch": (),
})

BATCH_AXES = RULES["batch"]
LARGE_PARAMETER = 64 * 1024  # elements above which a silently replicated parameter is an error


def spec_for(
    axes: Axes | None, shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules = RULES, *, fall_back: bool = True
) -> PartitionSpec:
    """How an array with these logical axes is cut on this mesh.

    Mesh axes of size 1 are dropped; no mesh axis is used twice. A mesh axis that does not divide its dimension moves to the
    next dimension that it divides and whose rule shards at all (then to one before), else it is dropped.

    Args:
      axes: logical names (None: never cut) of the trailing dimensions; what leads them (stacked layers) is not cut.
        None for the whole: nothing is declared, nothing is cut.
      shape: the array's shape, at least as long as `axes`.
      fall_back: whether a mesh axis may move; activations pass False, since there a surprise costs a reshard per layer.
    Raises:
      ConfigError: an unknown logical name, or more names than dimensions.
    """
    axes = () if axes is None else tuple(axes)
    if len(axes) > len(shape):
        raise ConfigError(f"logical axes {axes}: more names than the dimensions of shape {tuple(shape)}")
    axes = (None,) * (len(shape) - len(axes)) + axes
    wanted = [_mesh_axes(name, mesh, rules) for name in axes]
    cuts: list[list[str]] = [[] for _ in shape]
    homeless: list[tuple[int, str]] = []
    used: set[str] = set()

    def place(dimension: int, axis: str) -> bool:
        parts = math.prod(mesh.shape[a] for a in cuts[dimension]) * mesh.shape[axis]
        if shape[dimension] == 0 or shape[dimension] % parts:
            return False
        cuts[dimension].append(axis)
        used.add(axis)
        return True

    for dimension, mesh_axes in enumerate(wanted):
        for axis in mesh_axes:
            if axis not in used and not place(dimension, axis):
                homeless.append((dimension, axis))
    if fall_back:
        for dimension, axis in homeless:
            others = [*range(dimension + 1, len(shape)), *range(dimension)]
            if axis not in used:
                any(place(other, axis) for other in others if axes[other] is not None and rules[axes[other]])
    return _partition_spec(cuts)


def _mesh_axes(name: str | None, mesh: Mesh | AbstractMesh, rules: Rules) -> list[str]:
    if name is None:
        return []
    check_choice("logical axis", name, rules)
    return [axis for axis in rules[name] if mesh.shape.get(axis, 1) > 1]


def _partition_spec(cuts: Sequence[Sequence[str]]) -> PartitionSpec:
    entries: list[Any] = [tuple(cut) if len(cut) > 1 else cut[0] if cut else None for cut in cuts]
    while entries and entries[-1] is None:  # one spelling per sharding, so that specs compare equal
        entries.pop()
    return PartitionSpec(*entries)


def batch_spec(ndim: int) -> PartitionSpec:
    """The spec of a batch array: rows over the batch axes; the length of a [B, T] array over `sequence`."""
    return PartitionSpec(BATCH_AXES, *RULES["length"]) if ndim == 2 else PartitionSpec(BATCH_AXES)


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """The sharding of a batch array of this global shape, `batch_spec` without the mesh axes of size 1.

    A length that `sequence` does not divide stays whole.
    Raises:
      ConfigError: the rows do not divide over the batch axes.
    """
    check_batch(shape[0], mesh)
    axes = ("batch", "length") if len(shape) == 2 else ("batch",) + (None,) * (len(shape) - 1)
    return NamedSharding(mesh, spec_for(axes, shape, mesh, fall_back=False))


def check_batch(batch_size: int, mesh: Mesh | AbstractMesh) -> None:
    """Raise a ConfigError unless the rows of a (micro)batch divide over the mesh's batch axes."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        listed = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH_AXES if mesh.shape[axis] > 1)
        raise ConfigError(f"batch_size = {batch_size}: rows (of one microbatch) must be a multiple of {parts}, "
                          f"the devices they are spread over ({listed})")


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that holds the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


use_mesh = jax.set_mesh
"""`with use_mesh(mesh):` makes `constrain` act in what is traced inside.

It is JAX's own context, because jit keeps one trace per mesh context: with a variable of ours a function traced
outside would be reused inside, without its constraints.
"""


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` with the layout its logical axes ask for on the mesh of `use_mesh`; without a mesh, `x` itself.

    Args:
      x: an activation.
      axes: a logical name per trailing dimension; None keeps that dimension whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    automatic = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not automatic:  # the body of a shard_map over all axes: x is one device's part already
        return x
    rules = {name: tuple(a for a in mesh_axes if a in automatic) for name, mesh_axes in RULES.items()}
    return jax.lax.with_sharding_constraint(x, spec_for(axes, x.shape, mesh, rules, fall_back=False))


def is_axes(node: Any) -> bool:
    """Whether a node of a tree of axes is one array's tuple of logical names."""
    return node is None or (type(node) is tuple and all(name is None or isinstance(name, str) for name in node))


def sharding_tree(axes_tree: Any, shapes_tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Shardings of a parameter tree, with the structure of `shapes_tree`.

    Args:
      axes_tree: a tuple of logical names per parameter. Where the parameter is a container (codes and scales of a quantized
        weight), each of its arrays is cut by the same names as far as its own shape allows.
      shapes_tree: arrays or ShapeDtypeStructs.
    """

    def parameter(axes: Axes | None, value: Any) -> Any:
        whole = _logical_shape(value)
        return jax.tree.map(lambda leaf: NamedSharding(mesh, _part_spec(axes, whole, leaf.shape, mesh, rules)), value)

    return jax.tree.map(parameter, axes_tree, shapes_tree, is_leaf=is_axes)


def optimizer_sharding(state: Any, params: Any, axes_tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Shardings of an optax state, with its structure: each moment is cut as its parameter is.

    A moment is found by name: the path to it contains the whole path of its parameter (`0.mu.blocks.0.mlp.up`), also below
    masks, chains and partitions, and also when the moment is a container of codes and scales. A moment that has lost
    dimensions (Adafactor's rows and columns) keeps the axes of those it has. Everything else (counts, norms) is replicated.

    Args:
      state: the abstract optimizer state, `jax.eval_shape(optimizer.init, params)`.
      params: the parameter tree, arrays or ShapeDtypeStructs.
      axes_tree: logical names per parameter, as for `sharding_tree`.
    """
    known: _Known = {}

    def remember(path: Any, axes: Axes | None, value: Any) -> None:
        known[_names(path)] = (axes, _logical_shape(value))

    jax.tree_util.tree_map_with_path(remember, axes_tree, params, is_leaf=is_axes)

    def moment(path: Any, leaf: Any) -> NamedSharding:
        axes, whole = _parameter_in(_names(path), known)
        return NamedSharding(mesh, _part_spec(axes, whole, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(moment, state)


_Known = dict[tuple[str, ...], tuple[Axes | None, tuple[int, ...]]]


def _parameter_in(path: tuple[str, ...], known: _Known) -> tuple[Axes | None, tuple[int, ...]]:
    """Axes and shape of the longest parameter path within `path`, of equally long ones the last; no axes if there is none."""
    for length in range(len(path), 0, -1):
        for start in range(len(path) - length, -1, -1):
            if path[start : start + length] in known:
                return known[path[start : start + length]]
    return None, ()


def _logical_shape(value: Any) -> tuple[int, ...]:
    """The parameter's own shape; of a container, that of its largest array."""
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(value)]
    return max(shapes, key=math.prod, default=())


def _part_spec(
    axes: Axes | None, whole: tuple[int, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules
) -> PartitionSpec:
    """The spec of an array that belongs to a parameter of shape `whole`."""
    axes = () if axes is None else axes
    if len(axes) > len(whole):
        raise ConfigError(f"logical axes {axes}: more names than the dimensions of the parameter's shape {whole}")
    if len(shape) == len(whole):
        return spec_for(axes, shape, mesh, rules)
    padded = (None,) * (len(whole) - len(axes)) + axes
    kept = _kept_dimensions(whole, shape)
    return PartitionSpec() if kept is None else spec_for(tuple(padded[d] for d in kept), shape, mesh, rules)


def _kept_dimensions(whole: tuple[int, ...], shape: tuple[int, ...]) -> list[int] | None:
    """Which dimensions of `whole` remain in `shape`, in order; None when it is no subsequence."""
    kept, start = [], 0
    for size in shape:
        start = next((d for d in range(start, len(whole)) if whole[d] == size), len(whole)) + 1
        if start > len(whole):
            return None
        kept.append(start - 1)
    return kept


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


class Row(NamedTuple):
    """One line of the sharding table."""

    parameter: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    bytes_per_device: int


def table(axes_tree: Any, shapes_tree: Any, mesh: Mesh, rules: Rules = RULES) -> list[Row]:
    """Name, shape, spec and bytes per device of every array of a parameter tree, in tree order."""
    return list(_rows(shapes_tree, sharding_tree(axes_tree, shapes_tree, mesh, rules)))


def _rows(shapes_tree: Any, shardings: Any) -> Iterator[Row]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(shapes_tree)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        shape = tuple(leaf.shape)
        yield Row(".".join(_names(path)), shape, str(leaf.dtype), sharding.spec, bytes_per_device(leaf, sharding))


def bytes_per_device(array: Any, sharding: NamedSharding) -> int:
    """Bytes of one device's part of an array (anything with shape and dtype)."""
    return math.ceil(math.prod(sharding.shard_shape(tuple(array.shape))) * jax.dtypes.itemsize_bits(array.dtype) / 8)


def format_table(rows: Sequence[Row]) -> str:
    """The table as aligned text, with its sum."""
    head = ("parameter", "shape", "dtype", "spec", "bytes/device")
    lines = [(r.parameter, "x".join(map(str, r.shape)) or "scalar", r.dtype, format_spec(r.spec), f"{r.bytes_per_device:,}")
             for r in rows]
    lines.append(("total", "", "", "", f"{sum(r.bytes_per_device for r in rows):,}"))
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    aligned = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line[:-1], widths, strict=False)), line[-1].rjust(widths[-1])])
        for line in [head, *lines]
    ]
    return "\n".join(aligned)


def format_spec(spec: PartitionSpec) -> str:
    """`fsdp, tensor`; `-` for a whole dimension, `replicated` when nothing is cut."""
    cells = ["-" if cut is None else cut if isinstance(cut, str) else "+".join(cut) for cut in spec]
    return ", ".join(cells) if any(cut is not None for cut in spec) else "replicated"


def require_sharded(axes_tree: Any, shapes_tree: Any, mesh: Mesh, config: MeshConfig, rules: Rules = RULES) -> None:
    """Refuse a large parameter that every device would hold whole although an axis for parameters exists.

    Raises:
      ConfigError: naming each parameter above 64 Ki elements that is fully replicated while fsdp or tensor is above 1,
        unless `mesh.allow_replicated`.
    """
    cutting = [f"{axis}={mesh.shape[axis]}" for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1]
    if config.allow_replicated or not cutting:
        return
    whole = [row for row in table(axes_tree, shapes_tree, mesh, rules)
             if math.prod(row.shape) > LARGE_PARAMETER and all(cut is None for cut in row.spec)]
    if whole:
        listed = "; ".join(f"{row.parameter} {row.shape} ({row.bytes_per_device:,} bytes)" for row in whole[:8])
        more = f" and {len(whole) - 8} more" if len(whole) > 8 else ""
        raise ConfigError(f"mesh ({', '.join(cutting)}): every device would hold the whole of {listed}{more}; choose sizes "
                          "that divide a dimension, or allow it with mesh.allow_replicated = True")
