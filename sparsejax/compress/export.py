"""From a model trained with quantized weights to one that stores them: each such kernel becomes its packed array.

The exported values go into the structure of the trained model. Its weight ops leave a packed kernel as it is, so both serve the
same bits, and the exported one reads a quarter or an eighth of the bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from sparsejax.arrays import QTensor
from sparsejax.context import Context
from sparsejax.layers.linear import Linear
from sparsejax.nnx_compat import Structure, at, merge
from sparsejax.plugs import ConfigError
from sparsejax.train.state import cast_for_compute

SERVING = Context(mode="prefill")


class Row(NamedTuple):
    """One kernel that was packed and its number format; `bytes_before` as it was given."""

    parameter: str
    format: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int


class Exported(NamedTuple):
    """The values to serve, what was packed, and the bytes of all parameters before and after."""

    values: dict[str, Any]
    rows: list[Row]
    bytes_before: int
    bytes_after: int


def export(structure: Structure, values: dict[str, Any], dtype: str = "float32") -> Exported:
    """Pack every kernel whose weight ops quantize it; all else is cast to the dtype in which it is multiplied.

    Args:
      structure: of the trained model (`nnx_compat.split`).
      values: its parameters as trained.
      dtype: the model's compute dtype, `config.model.dtype`.
    Raises:
      ConfigError: no rule of `model.weights` quantizes a kernel of this model.
    """
    packed = jax.jit(lambda v: packed_values(structure, v, dtype))(values)
    rows = []
    for path, tensor in jax.tree_util.tree_flatten_with_path(packed, is_leaf=lambda v: isinstance(v, QTensor))[0]:
        if isinstance(tensor, QTensor):
            before = at(values, _names(path))
            name, after = ".".join(_names(path)), parameter_bytes(tensor)
            rows.append(Row(name, str(tensor.spec), before.shape, parameter_bytes(before), after))
    return Exported(packed, rows, parameter_bytes(values), parameter_bytes(packed))


def packed_values(structure: Structure, values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The exported values alone; traceable, so that `jax.eval_shape` gives what a checkpoint of them restores into."""
    cast = cast_for_compute(structure, values, dtype)
    packed, found = jax.tree.map(lambda v: v, cast), 0
    nodes, _ = jax.tree_util.tree_flatten_with_path(merge(structure, cast), is_leaf=lambda v: isinstance(v, Linear))
    for path, node in nodes:
        if isinstance(node, Linear) and node.weights:
            kernel = node.kernel.get_value()
            for op in node.weights.values():
                kernel = op(kernel, SERVING)
            if isinstance(kernel, QTensor):
                at(packed, _names(path))["kernel"] = kernel
                found += 1
    if not found:
        raise ConfigError("model.weights: no rule quantizes a weight of this model, so there is nothing to export; "
                          "allowed is for example ('blocks.**=int8',)")
    return packed


def parameter_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def report(exported: Exported) -> str:
    """The packed kernels and the totals as aligned text."""
    width, wide = (max(len(getattr(row, field)) for row in exported.rows) for field in ("parameter", "format"))
    lines = [
        f"{parameter:<{width}}  {format:<{wide}}  {'x'.join(map(str, shape)):>16}  {before:>14,} -> {after:,}"
        for parameter, format, shape, before, after in exported.rows
    ]
    ratio = exported.bytes_before / exported.bytes_after
    total = f"bytes of parameters: {exported.bytes_before:,} -> {exported.bytes_after:,} ({ratio:.2f}x smaller)"
    return "\n".join([*lines, total])


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
