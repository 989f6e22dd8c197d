"""The only file that touches parts of Flax that change between releases.

Modules are plain containers. `split` takes one apart into a `Structure` (static) and a nested pure dict of arrays, `merge` puts
it together again; everything between, and everything that transforms, is plain JAX on the dict.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

Module = nnx.Module
data = nnx.data

_READ_ONLY: contextvars.ContextVar[bool] = contextvars.ContextVar("read_only", default=False)

ROLES = ("matrix", "embedding", "norm", "router", "scale", "adapter", "bias", "nonlinearity", "fitted")
COMPUTE_ROLES = ("matrix", "embedding", "adapter", "bias")  # held in the compute dtype; the others stay in float32
LAYERCAST = "layercast"  # LayerCast (arXiv 2506.09501): linear maps held in bfloat16, everything computed in float32


def held_in(role: str, dtype: str) -> str:
    """The dtype in which a weight of this role is held where the model computes in `dtype`, which may be `LAYERCAST`."""
    if dtype == LAYERCAST:
        return "bfloat16" if role in ("matrix", "adapter") else "float32"
    return dtype if role in COMPUTE_ROLES else "float32"


class Weight(nnx.Variable):
    """An array of the model with its annotation.

    Metadata:
      axes: logical axis names of the trailing dimensions; what leads them (stacked layers) is not declared.
      role: one of ROLES; sharding, weight decay, compute dtype and exporters read it.
    """

    def _check_can_update(self) -> None:
        # A write inside the model would be lost without a word under scan: Flax sees an unflattened Variable of this trace.
        if _READ_ONLY.get():
            raise RuntimeError(
                "a Variable was written inside the model; state leaves through aux['stats'] and is applied once per step"
            )
        super()._check_can_update()


def weight(value: Any, axes: tuple[str | None, ...], role: str) -> Weight:
    """A Weight; `axes` name the trailing dimensions of `value`."""
    if role not in ROLES:
        raise ValueError(f"role {role!r} is not one of {ROLES}")
    return Weight(value, axes=tuple(axes), role=role)


@contextlib.contextmanager
def read_only() -> Iterator[None]:
    """While active, writing any Weight raises."""
    token = _READ_ONLY.set(True)
    try:
        yield
    finally:
        _READ_ONLY.reset(token)


@dataclasses.dataclass(frozen=True)
class Structure:
    """All of a module but its arrays: where each Weight sits, and its metadata."""

    treedef: Any
    paths: tuple[tuple[str, ...], ...]
    variables: tuple[Weight, ...]

    def annotations(self) -> dict[str, Any]:
        """Nested dict, parallel to the arrays, of the Weights themselves (for their `axes` and `role`)."""
        return _nest(zip(self.paths, self.variables, strict=True))

    def map(self, fn: Callable[..., Any], *trees: dict[str, Any]) -> dict[str, Any]:
        """`fn(weight, *values)` for each Weight and its value in each tree, as a nested dict."""
        return _nest(
            (path, fn(variable, *(at(tree, path) for tree in trees)))
            for path, variable in zip(self.paths, self.variables, strict=True)
        )


def split(module: nnx.Module) -> tuple[Structure, dict[str, Any]]:
    """A module as (Structure, nested dict of values).

    Raises:
      TypeError: an array that is not held by a Weight, named by its path.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(module, is_leaf=lambda v: isinstance(v, nnx.Variable))
    paths, variables = [], []
    for key_path, leaf in leaves:
        path = tuple(_key_name(key) for key in key_path)
        if not isinstance(leaf, Weight):
            raise TypeError(
                f"{'.'.join(path)}: a module holds its arrays in nnx_compat.weight, this is a {type(leaf).__name__}"
            )
        paths.append(path)
        variables.append(leaf)
    values = _nest((path, variable.get_value()) for path, variable in zip(paths, variables, strict=True))
    return Structure(treedef, tuple(paths), tuple(_abstract(v) for v in variables)), values


def merge(structure: Structure, values: dict[str, Any]) -> Any:
    """The module of `structure` with `values` in place."""
    filled = [variable.replace(at(values, path)) for path, variable in zip(structure.paths, structure.variables, strict=True)]
    return jax.tree_util.tree_unflatten(structure.treedef, filled)


def abstract(build: Callable[..., nnx.Module], *arguments: Any) -> tuple[Structure, dict[str, Any]]:
    """Structure and ShapeDtypeStructs of `build(*arguments)`, without computing or allocating anything."""
    return split(jax.eval_shape(build, *arguments))


def _abstract(variable: Weight) -> Any:
    return variable.replace(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variable.get_value()))


def _key_name(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unknown tree key {key!r}")


def at(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    """The node of a nested dict at a path."""
    for name in path:
        tree = tree[name]
    return tree


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set the node of a nested dict at a path."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _nest(items: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in items:
        put(tree, path, value)
    return tree
