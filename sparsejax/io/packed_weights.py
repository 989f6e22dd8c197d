"""Quantized maps of a published checkpoint as QTensors of a model, and back: which entries of a name map hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import nnx_compat
from sparsejax.io.name_map import Entry, Slot, Stacked, Transposed
from sparsejax.quantized_arrays import QTensor

LAYOUTS = (Transposed(), Stacked(Transposed()))  # a map, and one per expert; what is fused or cut is not read packed


def misplaced(entries: Sequence[Entry], slots: dict[str, Slot], packed: set[str]) -> list[str]:
    """What cannot be held as it is stored, in words: maps that share a tensor with others, layers that differ from their stack.

    Args:
      entries: of the model. slots: of its parameters. packed: published names of quantized maps.
    """
    found: list[str] = []
    by_array: dict[tuple[str, ...], list[tuple[str, bool]]] = {}
    for one in entries:
        quantized = [name for name in one.theirs if name in packed]
        if quantized and one.layout not in LAYOUTS:
            found.append(f"{quantized[0]} (for {', '.join(one.ours)}, of which it holds several or parts)")
        by_array.setdefault(slots[one.ours[0]].path, []).extend((name, name in packed) for name in one.theirs)
    for names in by_array.values():
        alike = {is_packed: name for name, is_packed in reversed(names)}
        if len(alike) == 2:
            found.append(f"{alike[False]} (plain, and {alike[True]}, of the same stack of layers, is quantized)")
    return found


def joined(rows: Mapping[int | None, Sequence[QTensor]], experts: bool) -> QTensor | None:
    """One QTensor of layers in order, by row (None: the only one), and of experts; None where their formats differ."""
    if len({jax.tree.structure(tensor) for tensors in rows.values() for tensor in tensors}) > 1:
        return None
    layers = [_stacked(rows[row]) if experts else rows[row][0] for row in sorted(rows, key=lambda row: row or 0)]
    return layers[0] if None in rows else _stacked(layers)


def activation_rules(entries: Sequence[Entry], activations: Mapping[str, str]) -> tuple[str, ...]:
    """Rules of `model.inputs` by which maps round what enters them: one for all layers where these agree.

    Args:
      entries: of the model. activations: by published name of a map, its format; "": none.
    """
    by_name: dict[str, dict[str, str]] = {}
    for one in entries:
        for name in one.theirs:
            if name in activations:
                site = one.ours[0].removesuffix(".kernel")
                layerless = ".".join("*" if part.isdigit() else part for part in site.split("."))
                by_name.setdefault(layerless, {})[site] = activations[name]
    rules: list[str] = []
    for layerless, texts in by_name.items():
        first = next(iter(texts.values()))
        chosen = {layerless: first} if set(texts.values()) == {first} else texts
        rules += [f"{site}=rounded:{text}" for site, text in chosen.items() if text]
    return tuple(rules)


def _stacked(tensors: Sequence[QTensor]) -> QTensor:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *tensors)


def holds_nan(tensor: QTensor) -> bool:
    """Whether a scale, a minimum or an FP8 code is NaN."""
    exponents = tensor.spec.scale == "e8m0" and bool(jnp.any(tensor.scale == 255))
    floats = [leaf for leaf in jax.tree.leaves(tensor) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return exponents or any(bool(jnp.isnan(leaf.astype(jnp.float32)).any()) for leaf in floats)


def published_kernels(one: Entry, slot: Slot, values: dict[str, Any]) -> dict[str, QTensor]:
    """Published name -> kernel [in, out] of an entry whose parameter is a QTensor."""
    tensor = nnx_compat.at(values, slot.path)
    row = tensor if slot.row is None else _row(tensor, slot.row)
    if one.layout == Transposed():
        return {one.theirs[0]: row}
    return {name: _row(row, expert) for expert, name in enumerate(one.theirs)}


def _row(tensor: QTensor, row: int) -> QTensor:
    return jax.tree.map(lambda part: part[row], tensor)
