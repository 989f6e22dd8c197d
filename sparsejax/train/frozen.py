"""The parameters that a run does not train, saved once beside its checkpoints: `checkpoints/frozen/0`.

Each checkpoint's record holds the digest of that folder, so that a checkpoint is never restored around other weights.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sparsejax.arrays import QTensor
from sparsejax.nnx_compat import Structure, at, put
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.train import checkpoint_files as files
from sparsejax.train import checkpoint_tree as trees
from sparsejax.train.checkpoint import TREE, Checkpoints, Record, read_record, restore
from sparsejax.train.checkpoint_files import CheckpointError

FROZEN = "frozen"


def save_frozen(folder: Path, values: dict[str, Any], report: Callable[[str], None]) -> str:
    """Write the frozen parameters of a new history into a folder of checkpoints; returns what `frozen_digest` gives.

    Raises:
      CheckpointError: they could not be written.
    """
    checkpoints = Checkpoints(folder / FROZEN, resumed_from=None, keep=1, report=report)
    checkpoints.save_now(0, values, Record(0))
    checkpoints.close()
    return frozen_digest(folder)


def frozen_digest(folder: Path) -> str:
    """What identifies the frozen parameters of a folder of checkpoints; "" where there are none."""
    path = folder / FROZEN / "0"
    return str(files.read_json(path / files.MANIFEST)["sha256"]) if path.is_dir() else ""


def restore_frozen(checkpoint: Path, like: dict[str, Any]) -> dict[str, Any]:
    """The frozen parameters that belong to a checkpoint.

    Args:
      checkpoint: its folder.
      like: their shapes, dtypes and shardings; {} where everything was trained.
    Raises:
      CheckpointError: they are missing, damaged, of another history, or do not fit `like`.
    """
    path = checkpoint.parent / FROZEN / "0"
    expected = read_record(checkpoint).extra.get(FROZEN, "")
    if not like and not expected:
        return {}
    problem = files.damage(path)
    if problem is None and frozen_digest(checkpoint.parent) != expected:
        problem = f"not the weights that {checkpoint} was trained around"
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    return restore(path, like)


def packed_as_saved(checkpoint: Path, structure: Structure, like: dict[str, Any]) -> dict[str, Any]:
    """`like` with the packed weights that a checkpoint's frozen parameters hold in place of plain ones.

    Args:
      structure: of the model.
      like: shapes of all its parameters, as drawn.
    """
    path = checkpoint.parent / FROZEN / "0" / TREE
    if not path.is_file():
        return like
    leaves, static = trees.from_json(files.read_json(path), str(path))
    result = jax.tree.map(lambda a: a, like)
    for one in structure.paths:
        name = ".".join(one)
        parts = {leaf.removeprefix(f"{name}."): found for leaf, found in leaves.items() if leaf.startswith(f"{name}.")}
        if name in static and parts:
            arrays = {part: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for part, leaf in parts.items()}
            put(result, one, _packed(static[name], arrays, at(like, one), str(path)))
    return result


def _packed(text: str, arrays: dict[str, Any], like: Any, where: str) -> QTensor:
    """An abstract QTensor whose static description (`checkpoint_tree.static_parts`) is `text`."""
    named = re.match(r"QTensor\(FormatSpec\('([^']*)'\)", text)
    if named and set(arrays) <= {field.name for field in dataclasses.fields(QTensor)}:
        spec = FormatSpec.parse(named[1], f"{where}: format")
        packed = QTensor(**arrays, spec=spec, shape=tuple(like.shape[-2:]), dtype=like.dtype)
        if trees.static_parts({"w": packed})["w"] == text:
            packed.check(where)
            return packed
    raise CheckpointError(f"{where}: a weight array {text} that this version does not know")
