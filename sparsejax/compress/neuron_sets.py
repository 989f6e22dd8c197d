"""The hidden units of FFNs as an index: take some of them, in any order, and the model is smaller or the same.

A sequence-level set (GRIFFIN, CoreInfer) is read off a prompt once; what follows is decoded by a model whose W_gate, W_up and
W_down are sliced to it, with dense products, against the key-value cache that the whole model has filled:

    small = select_neurons(model, prompt);   cache of the prompt -> carried(cache, model, small) -> decode with `small`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sparsejax import nnx_compat, plugs
from sparsejax.compress.blocks import Blocks, taps
from sparsejax.compress.surgery import chain_at, rules_from
from sparsejax.io.model import Model
from sparsejax.io.name_map import parameter_slots
from sparsejax.methods.sparsity.sequence_sets import SequenceSet, check_plain_ffn
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.plugs import check

Cache = dict[str, Any]


def with_neurons(model: Model, units: Mapping[int, Int[np.ndarray, " k"]]) -> Model:
    """The model whose FFN in each layer of `units` has these hidden units, in this order; other layers keep theirs.

    Raises:
      ConfigError: an FFN with ops that are fitted to its units, a packed kernel, a layer without a dense FFN.
    """
    check_plain_ffn(model.config, list(units))
    slots, annotations = parameter_slots(model.module(), model.structure.paths), model.structure.annotations()
    hidden, arrays = model.config.ffn.hidden, {}
    for name, slot in slots.items():
        layer = _ffn_layer(name)
        if layer not in units:
            continue
        axes, value = nnx_compat.at(annotations, slot.path).axes, model.parameter(name)
        check(not dataclasses.is_dataclass(value), "hidden units", name, "is packed; choose units before packing")
        for axis, label in zip(range(value.ndim - len(axes), value.ndim), axes, strict=True):
            if label == "mlp":  # an up map of two halves has both outputs of a unit
                chosen = np.concatenate([units[layer] + half * hidden for half in range(value.shape[axis] // hidden)])
                value = jnp.take(value, chosen, axis=axis)
        arrays[name] = value
    return model.rebuilt(_narrowed(model.config, {layer: len(chosen) for layer, chosen in units.items()}), arrays)


def _ffn_layer(name: str) -> int:
    """The layer of a parameter `blocks.3.mlp....`; -1 of any other."""
    stack, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    return int(layer) if stack == "blocks" and part.startswith("mlp.") else -1


def _narrowed(config: ModelConfig, widths: Mapping[int, int]) -> ModelConfig:
    whole = config.ffn.hidden
    wanted = [widths.get(layer, whole) for layer in range(config.num_layers)]
    if len(set(wanted)) == 1:
        return dataclasses.replace(config, ffn=dataclasses.replace(config.ffn, hidden=wanted[0]))
    feeds = tuple("ffn" if width == whole else f"ffn_of:{width}" for width in wanted)
    return dataclasses.replace(config, feed_pattern=feeds)


def select_neurons(model: Model, prompt: Int[np.ndarray, "B T"]) -> Model:
    """The model that decodes after a prompt: each FFN that has a sequence-level set is sliced to the set of this prompt.

    Args:
      prompt: token ids without padding; more than one row only where the set is `shared`.
    Raises:
      ConfigError: no sets in this model, other ops at the units they choose from, several rows and a set for each.
    """
    ops = _sets(model.config)
    check(ops, "inputs", model.config.inputs, "puts a sequence-level set at no down map; nothing is to be selected")
    alone = all(op.shared for op in ops.values())
    check(len(prompt) == 1 or alone, "prompt", prompt.shape, "each row has its own set, and one model holds one; give one row, "
          "or a set with shared=true")
    blocks, units = Blocks(model), {}
    dense_tokens = jnp.zeros(prompt.shape, bool)
    h = blocks.embed(jnp.asarray(prompt))
    for layer in range(max(ops) + 1):
        h, stats = blocks.run(layer, h, probes=taps("mlp.hidden"), sparsify=dense_tokens)
        if layer in ops:
            chosen = _chosen(model, layer, ops[layer], stats["mlp.hidden"]["value"].value)
            units[layer] = np.flatnonzero(np.asarray(chosen)[0])
    return with_neurons(_without_sets(model, ops), units)


def decoding_model(model: Model, prompt: Int[np.ndarray, "B T"]) -> Model:
    """What decodes after a prompt: `select_neurons` where the model has sets, else itself."""
    return select_neurons(model, prompt) if _sets(model.config) else model


def _sets(config: ModelConfig) -> dict[int, SequenceSet]:
    """The sequence-level set of each layer that has one."""
    found: dict[int, SequenceSet] = {}
    for layer in range(config.num_layers):
        site = f"blocks.{layer}.mlp.down"
        ops = plugs.resolve_chain("activation_op", "|".join(chain_at(config, "inputs", site)))
        sets = [op for op in ops if isinstance(op, SequenceSet)]
        check(len(ops) == 1 or not sets, f"inputs: {site}", ops, "others act beside the set, and would not fit its slices")
        if sets:
            found[layer] = sets[0]
    return found


def _chosen(model: Model, layer: int, op: SequenceSet, hidden: Array) -> Array:
    shape = (model.config.ffn.hidden, model.config.d_model)
    declared = op.parameters(shape, ("mlp", "embed"), jax.random.key(0)) if hasattr(op, "parameters") else {}
    arrays = {name: model.parameter(f"blocks.{layer}.mlp.down.inputs.0.{name}") for name in declared}
    return jax.jit(op.chosen)(arrays, hidden, jnp.ones(hidden.shape[:2], bool))


def _without_sets(model: Model, ops: Mapping[int, SequenceSet]) -> Model:
    chains = {site: chain_at(model.config, "inputs", site) for site in rule_sites(model.config)["inputs"]}
    chains.update({f"blocks.{layer}.mlp.down": () for layer in ops})
    rules = {field: getattr(model.config, field) for field in ("weights", "neurons", "residuals")}
    return model.with_rules(inputs=rules_from(chains), **rules)


def carried(cache: Cache, source: Model, target: Model) -> Cache:
    """A cache of `source` as `target` reads it: the same layers, stacked as its blocks are."""
    layers: dict[int, Any] = {}
    for segment, slot, row, repeats, layer in _places(source):
        held = cache[segment][slot]
        layers[layer] = jax.tree.map(lambda a, row=row: a[row], held) if repeats > 1 else held
    found: Cache = {}
    rows: dict[tuple[str, str], list[Any]] = {}
    for segment, slot, _, _, layer in _places(target):
        rows.setdefault((segment, slot), []).append(layers[layer])
    for (segment, slot), held in rows.items():
        stacked = held[0] if len(held) == 1 else jax.tree.map(lambda *a: jnp.stack(a), *held)
        found.setdefault(segment, {})[slot] = stacked
    return found


def _places(model: Model) -> list[tuple[str, str, int, int, int]]:
    """(segment, slot, row, rows of the segment, layer) of every layer, in order."""
    found, start = [], 0
    for segment, (period, repeats) in enumerate(model.module().blocks.plan):
        found += [(str(segment), str(slot), row, repeats, start + row * period + slot)
                  for row in range(repeats) for slot in range(period)]
        start += period * repeats
    return found
