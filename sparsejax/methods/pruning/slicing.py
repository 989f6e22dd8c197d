"""Units of a decoder cut out of its kernels, so that it has fewer parameters and not merely zeros: FFN neurons, GQA groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sparsejax import plugs
from sparsejax.io.model import Model
from sparsejax.io.name_map import parameter_slots
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check


def check_sliceable(config: ModelConfig, *, neurons: bool, heads: bool) -> None:
    """Refuse a model whose neurons or heads cannot be cut out.

    Raises:
      ConfigError: no decoder, ops that are fitted to its widths, expert or doubled or learned FFNs, a norm over all heads.
    """
    check(config.kind == "decoder", "model.kind", config.kind, "only decoders are sliced")
    for field in ("inputs", "weights", "neurons"):
        rules = getattr(config, field)
        check(not rules, f"model.{field}", rules, "is fitted to widths that would change; slice first")
    if neurons:
        dense = all(feed.partition(":")[0] == "ffn" for feed in config.feed_pattern)
        check(dense, "model.feed_pattern", config.feed_pattern, "experts are not sliced")
        spec = plugs.resolve("nonlinearity", config.ffn.activation, "model.ffn.activation")
        plain = not spec.halves and not spec.parameters(config.ffn.hidden)
        check(plain, "model.ffn.activation", config.ffn.activation, "ties its neurons together, or has parameters of its own")
    if heads:
        check(not config.attention.qk_norm or config.attention.qk_norm_over == "head", "model.attention.qk_norm_over",
              config.attention.qk_norm_over, "one norm over all heads would change with them")


def with_neurons(model: Model, kept: Sequence[np.ndarray]) -> Model:
    """The model with these neurons of each layer's FFN alone: columns of gate and up, rows of down; the same number everywhere.

    Args:
      kept: of each layer, increasing indices [F'].
    """
    arrays: dict[str, Any] = {}
    for layer, index in enumerate(kept):
        for name, axis in (("gate", -1), ("up", -1), ("down", 0)):
            arrays |= _taken(model, f"blocks.{layer}.mlp.{name}", index, axis)
    ffn = dataclasses.replace(model.config.ffn, hidden=len(kept[0]))
    return model.rebuilt(dataclasses.replace(model.config, ffn=ffn), arrays)


def with_head_groups(model: Model, kept: Sequence[np.ndarray]) -> Model:
    """The model with these key-value heads of each layer alone, and the query heads that read them.

    Args:
      kept: of each layer, increasing indices [G'].
    """
    a = model.config.attention
    queries = a.num_heads // a.num_kv_heads
    arrays: dict[str, Any] = {}
    for layer, groups in enumerate(kept):
        inner = _columns(groups, queries * a.head_dim)
        inner_kv = _columns(groups, a.head_dim)
        for name, index, axis in (("q", inner, -1), ("k", inner_kv, -1), ("v", inner_kv, -1), ("o", inner, 0)):
            arrays |= _taken(model, f"blocks.{layer}.attn.{name}", index, axis)
    count = len(kept[0])
    attention = dataclasses.replace(a, num_heads=count * queries, num_kv_heads=count)
    return model.rebuilt(dataclasses.replace(model.config, attention=attention), arrays)


def _columns(groups: np.ndarray, width: int) -> np.ndarray:
    return (np.asarray(groups)[:, None] * width + np.arange(width)).ravel()


def _taken(model: Model, site: str, index: np.ndarray, axis: int) -> dict[str, Any]:
    """Kernel (and bias, along outputs) of a map with these outputs (axis -1) or inputs (axis 0) alone."""
    slots = parameter_slots(model.module(), model.structure.paths)
    found: dict[str, Any] = {}
    if f"{site}.kernel" in slots:
        kernel = model.parameter(f"{site}.kernel")
        check(isinstance(kernel, jax.Array), site, type(kernel).__name__, "is packed; slice before quantizing or packing")
        found[f"{site}.kernel"] = kernel.take(index, axis)
    if f"{site}.bias" in slots and axis == -1:
        found[f"{site}.bias"] = model.parameter(f"{site}.bias").take(index, -1)
    return found
