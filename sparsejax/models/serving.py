"""A model's serving form: the same function, its weights laid out for reading them once per token.

Decoding one token is one pass over all weights, so what counts is that each is read once, in place, and in few large pieces:

* every layer has arrays of its own: XLA:CPU copies a layer out of a stacked array before it multiplies (measured on SmolLM2's
  shape, 2 cores: 9 tokens/s from a scan over stacked layers, 20 from arrays of their own);
* q, k and v, and gate and up, are one product each, where no op acts at one of them alone;
* a tied head gets the table's transpose [D, V] on CPU, where a product with [V, D] reaches two thirds of the rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import nnx_compat
from sparsejax.layers.cache import cache_format, token_bytes
from sparsejax.layers.fused import Fused, can_fuse
from sparsejax.layers.linear import Linear
from sparsejax.layers.stack import Stack
from sparsejax.models.config import ModelConfig
from sparsejax.models.transformer import Transformer
from sparsejax.nnx_compat import Structure
from sparsejax.ops.attend import trace_platform


def serving_form(structure: Structure, values: dict[str, Any], *, consume: bool = False) -> tuple[Structure, dict[str, Any]]:
    """(structure, values) of a Transformer that computes what the given one does, up to rounding.

    Args:
      structure, values: of a Transformer; the values are on a device.
      consume: delete each stacked array of `values` once its layers are copied, so that memory holds one model and one
        stacked array at most; the given model cannot be used afterwards.
    """
    model: Transformer = nnx_compat.merge(structure, values)
    for stack in (model.encoder, model.blocks):
        if stack is not None:
            _separate_layers(stack, consume)
            for block in stack.segments["0"].values():
                _fuse(block)
    if model.config.value.head and model.head is None and trace_platform() == "cpu":
        model.head = nnx_compat.data(_own_head(model))
    return nnx_compat.split(model)


def read_bytes(structure: Structure, values: dict[str, Any]) -> int:
    """Bytes of weights that decoding one token reads: all but embedding rows looked up, and all experts (an upper bound)."""
    model: Transformer = nnx_compat.merge(structure, values)
    looked_up = 0
    for name in ("table", "positions", "types"):
        table = getattr(model.embed, name, None)
        if table is not None and not (name == "table" and model.head is None):
            looked_up += _bytes(table.get_value())
    encoder = 0 if model.encoder is None else _bytes(nnx_compat.split(model.encoder)[1])
    return _bytes(values) - looked_up - encoder


def cache_bytes(config: ModelConfig) -> int:
    """Bytes that a token adds to the key-value caches of all layers, scales included: what each later token reads of it (in
    layers of a sliding window only while it is inside)."""
    a = config.attention
    form = cache_format(a.cache_format, a.head_dim)
    return config.num_layers * token_bytes(form, heads=a.num_kv_heads, head_dim=a.head_dim, dtype=jnp.dtype(config.dtype))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _separate_layers(stack: Stack, consume: bool) -> None:
    """Make `stack` one segment with a period of all its layers."""
    layers: list[Any] = []
    for index, (period, repeats) in enumerate(stack.plan):
        slots = [list(_layers(stack.segments[str(index)][str(slot)], repeats, consume)) for slot in range(period)]
        layers += [slots[slot][repeat] for repeat in range(repeats) for slot in range(period)]
    stack.plan = ((len(layers), 1),)
    stack.segments = nnx_compat.data({"0": {str(number): block for number, block in enumerate(layers)}})


def _layers(stacked: Any, repeats: int, consume: bool) -> Iterator[Any]:
    structure, values = nnx_compat.split(stacked)
    leaves, treedef = jax.tree.flatten(values)
    separate = []
    for leaf in leaves:
        separate.append([leaf[layer : layer + 1] for layer in range(repeats)])
        if consume and repeats > 1:  # the whole of an array of one layer is that array, not a copy
            jax.block_until_ready(separate[-1])
            leaf.delete()
    for layer in range(repeats):
        yield nnx_compat.merge(structure, jax.tree.unflatten(treedef, [leaf[layer] for leaf in separate]))


def _fuse(block: Any) -> None:
    """Replace q, k and v, and gate and up, by one map each."""
    for module, names, fused in ((block.attn, ("q", "k", "v"), "qkv"), (block.mlp, ("gate", "up"), "gate_up")):
        linears = [getattr(module, name, None) for name in names]
        selected = getattr(module, "neurons", None) is not None  # by the gate, before up: they cannot be one product
        if hasattr(module, fused) and not selected and can_fuse(linears):
            setattr(module, fused, nnx_compat.data(Fused(linears)))
            for name in names:
                setattr(module, name, None)


def _own_head(model: Transformer) -> Linear:
    """A head of the transposed table; the bias of a tied head stays where it is."""
    table = model.embed.table.get_value()
    width, vocabulary = table.shape[1], table.shape[0]
    axes: Any = ("embed", "vocab")
    head = jax.eval_shape(
        lambda key: Linear(width, vocabulary, key=key, site="head", axes=axes, role="embedding"), jax.random.key(0)
    )
    head.kernel = nnx_compat.weight(jnp.array(table.T), axes, "embedding")
    return head
