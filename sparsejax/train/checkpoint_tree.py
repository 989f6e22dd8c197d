"""A tree of arrays as a flat table of named leaves, and the strict comparison of two such tables.

What is stored is `{"trainable.blocks.0.mlp.up.kernel": array}` beside a description of every leaf: restoring compares
descriptions first, so that a mismatch is told by name before a byte of state is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sparsejax.train.checkpoint_files import CheckpointError

# Array dtypes that the storage layer lacks, and a dtype that holds the same values.
STORED_AS = {"uint4": "uint8", "uint2": "uint8"}
FORMAT = 1
_LISTED = 8


class Leaf(NamedTuple):
    """Description of one leaf: `kind` is `array`, or the name of a Python scalar's type, whose value is then kept here."""

    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    value: int | float | bool | None = None


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path, in tree order.

    Raises:
      TypeError: two leaves with one path, or a leaf that is neither an array nor a number.
    """
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = prefix + jax.tree_util.keystr(path, simple=True, separator=".")
        if name in flat:
            raise TypeError(f"checkpoint: two leaves have the path {name!r}; keys may not contain a dot")
        flat[name] = leaf
    return flat


def describe(name: str, leaf: Any) -> Leaf:
    """The description of a leaf: an array, a ShapeDtypeStruct or a Python number."""
    if type(leaf) in (bool, int, float):  # a numpy float64 is a float too, but an array here
        return Leaf(type(leaf).__name__, value=leaf)
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(f"checkpoint: {name} is a {type(leaf).__name__}; only arrays and numbers can be saved")
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"checkpoint: {name} is a typed PRNG key; keep jax.random.key_data(key) in the state")
    return Leaf("array", tuple(leaf.shape), str(np.dtype(leaf.dtype)))


def static_parts(tree: Any, prefix: str = "") -> dict[str, str]:
    """Type and static fields of every registered container by path (`"down": "QTensor(64,)"`); dicts and tuples have none.

    Bits and group sizes of a packed weight are not in the shapes of its arrays, yet the arrays mean nothing without them.
    """
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=dataclasses.is_dataclass)
    return {
        prefix + jax.tree_util.keystr(path, simple=True, separator="."): _static_text(jax.tree.structure(node))
        for path, node in nodes
        if dataclasses.is_dataclass(node)
    }


def _static_text(structure: Any) -> str:
    data = structure.node_data()
    if data is None:
        return "*"
    node_type, metadata = data
    own = re.sub(r" at 0x[0-9a-f]+", "", repr(metadata))  # the address of a function is not a property of the tree
    below = ", ".join(text for text in map(_static_text, structure.children()) if text != "*")
    return f"{node_type.__name__}{own}" + (f"[{below}]" if below else "")


def differences(
    saved: Mapping[str, Leaf], wanted: Mapping[str, Leaf], saved_static: Mapping[str, str], wanted_static: Mapping[str, str]
) -> list[str]:
    """Every way in which two descriptions differ, one line per kind of difference; empty when they agree."""
    both = [name for name in wanted if name in saved]
    kinds = [(n, saved[n].kind, wanted[n].kind) for n in both if saved[n].kind != wanted[n].kind]
    shapes = [(n, saved[n].shape, wanted[n].shape) for n in both if saved[n].shape != wanted[n].shape]
    dtypes = [(n, saved[n].dtype, wanted[n].dtype) for n in both
              if saved[n].dtype != wanted[n].dtype and saved[n].kind == wanted[n].kind]
    static = [(n, saved_static.get(n, "a plain container"), wanted_static.get(n, "a plain container"))
              for n in sorted(saved_static.keys() | wanted_static.keys()) if saved_static.get(n) != wanted_static.get(n)]
    found = [
        _line("missing from the checkpoint", [n for n in wanted if n not in saved]),
        _line("in the checkpoint but not in this run", [n for n in saved if n not in wanted]),
        *(_line(f"wrong {what}", [f"{n}: saved {have}, wanted {want}" for n, have, want in pairs])
          for what, pairs in (("kind", kinds), ("shape", shapes), ("dtype", dtypes), ("container", static))),
    ]
    return [line for line in found if line]


def _line(title: str, names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{title}: {'; '.join(names[:_LISTED])}{more}" if names else ""


def to_json(leaves: Mapping[str, Leaf], static: Mapping[str, str]) -> dict[str, Any]:
    """The description as it is written beside the arrays."""
    rows = [[name, leaf.kind, list(leaf.shape), leaf.dtype, _number_text(leaf.value)] for name, leaf in leaves.items()]
    return {"format": FORMAT, "leaves": rows, "static": dict(static)}


def from_json(value: Any, where: str) -> tuple[dict[str, Leaf], dict[str, str]]:
    """The description that `to_json` wrote.

    Raises:
      CheckpointError: it was written by another version.
    """
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise CheckpointError(f"{where}: not of format {FORMAT}, which is what this version reads")
    try:
        leaves = {name: Leaf(kind, tuple(shape), dtype, _number(kind, text))
                  for name, kind, shape, dtype, text in value["leaves"]}
        return leaves, dict(value["static"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a description of a tree that this version can read ({error})") from error


def _number_text(value: int | float | bool | None) -> str | None:
    """Numbers as text: JSON has no inf, and a float must come back bit for bit."""
    return None if value is None else value.hex() if isinstance(value, float) else repr(value)


def _number(kind: str, text: str | None) -> int | float | bool | None:
    if text is None:
        return None
    if kind == "float":
        return float.fromhex(text)
    return text == "True" if kind == "bool" else int(text)
