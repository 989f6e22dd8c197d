"""Scales of channels moved between what gives a tensor and what reads it: the model computes the same function.

    producer  y_k / s_k        readers  W_k <- W_k s_k                          for every channel k of the tensor between them

A producer is the norm in front of the readers (gain and bias are divided), or a linear map whose output reaches the reader
channel by channel (its columns and bias are divided): `up` before `down`, where the hidden vector is a function of the gate
times up, and `v` before `o`, where every head has a v of its own. AWQ and SmoothQuant choose s. All is float64, rounded once
to the dtype of the parameter; with powers of two nothing is rounded and the model's outputs stay the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import nnx_compat, plugs
from sparsejax.compress.packed import float_kernel
from sparsejax.compress.recipe import Work
from sparsejax.compress.surgery import chain_at
from sparsejax.compress.transforms import check_mergeable
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_map import parameter_axes
from sparsejax.models.sizes import linear_shapes
from sparsejax.plugs import check

VERIFIED_TOKENS = 512  # of one sequence, on which passes verify that they changed nothing


class Pair(NamedTuple):
    """Between whom a scale can be moved.

    Fields:
      producer: a norm (`blocks.3.attn_norm`) or a linear map (`blocks.3.mlp.up`).
      readers: linear maps, in the order of the model.
    """

    producer: str
    readers: tuple[str, ...]

    @property
    def layer(self) -> int:
        return int(self.producer.split(".")[1])

    @property
    def of_norm(self) -> bool:
        return self.producer.endswith("norm")


def scaled_pairs(config: ModelConfig) -> tuple[list[Pair], dict[str, str]]:
    """(the pairs of all blocks in the order of the model, `{reader: why it has none}`).

    Raises:
      ConfigError: an arrangement whose norms no map takes up, or an op at a reader (`transforms.check_mergeable`).
    """
    names = set(parameter_axes(config))
    skipped: dict[str, str] = {}
    by_layer: dict[int, list[Pair]] = {layer: [] for layer in range(config.num_layers)}
    for stretch in check_mergeable(config):
        for read in stretch.reads:
            pair = Pair(read.norm, read.linears)
            if not read.norm.startswith("blocks."):
                continue  # the head's
            if f"{read.norm}.gain" in names:
                by_layer[pair.layer].append(pair)
            else:
                skipped |= dict.fromkeys(read.linears, "the norm before it has no gain")
    for layer, pairs in by_layer.items():
        for pair, why in (_values(config, layer), _hidden(config, layer)):
            ops = [site for site in (pair.producer, *pair.readers) for f in ("inputs", "weights") if chain_at(config, f, site)]
            why = why or (f"an op acts at {ops[0]}" if ops else "")
            if why:
                skipped |= dict.fromkeys(pair.readers, why)
            else:
                pairs.append(pair)
    order = ("attn_norm", "v", "mlp_norm", "up")
    found = [sorted(pairs, key=lambda p: order.index(p.producer.rpartition(".")[2])) for pairs in by_layer.values()]
    return [pair for pairs in found for pair in pairs], skipped


def _values(config: ModelConfig, layer: int) -> tuple[Pair, str]:
    a = config.attention
    shared = a.num_kv_heads != a.num_heads
    why = f"{a.num_heads} query heads share {a.num_kv_heads} v heads, so that channels of o have no v of their own"
    return Pair(f"blocks.{layer}.attn.v", (f"blocks.{layer}.attn.o",)), why if shared else ""


def _hidden(config: ModelConfig, layer: int) -> tuple[Pair, str]:
    feed, _, activation = config.feed_pattern[layer % len(config.feed_pattern)].partition(":")
    pair = Pair(f"blocks.{layer}.mlp.up", (f"blocks.{layer}.mlp.down",))
    if feed != "ffn":
        return pair, "a mixture of experts"
    spec = plugs.resolve("nonlinearity", activation or config.ffn.activation, "model.ffn.activation")
    linear = spec.gated and spec.has_gate_out and not spec.halves
    return pair, "" if linear else "the hidden vector is not linear in up"


def merge_scales(model: Model, pairs: Sequence[Pair], scales: Mapping[str, np.ndarray]) -> Model:
    """The same function with channels scaled.

    Args:
      pairs: of `scaled_pairs`.
      scales: by producer, float[channels], positive and finite; producers that are not named stay.
    Raises:
      ConfigError: scales of a producer that no pair has, of another length, or not positive; a kernel that is packed.
    """
    by_producer, shapes = {pair.producer: pair for pair in pairs}, linear_shapes(model.config)
    names = set(parameter_axes(model.config))
    new: dict[str, np.ndarray] = {}

    def get(name: str) -> np.ndarray:
        if name not in new:
            kernel = name.endswith(".kernel")
            new[name] = np.asarray(float_kernel(model, name.removesuffix(".kernel")) if kernel else model.parameter(name))
            new[name] = new[name].astype(np.float64)
        return new[name]

    for producer, s in scales.items():
        check(producer in by_producer, "scales", producer, f"gives nothing that can be scaled; {', '.join(by_producer)} do")
        pair, s = by_producer[producer], np.asarray(s, np.float64)
        width = shapes[pair.readers[0]][0]
        good = s.shape == (width,) and bool(np.all(np.isfinite(s) & (s > 0)))
        check(good, f"scales of {producer}", s.shape, f"must be {width} positive numbers")
        if pair.of_norm:
            offset = float(model.config.norm.plus_one)
            new[f"{producer}.gain"] = (get(f"{producer}.gain") + offset) / s - offset
        else:
            new[f"{producer}.kernel"] = get(f"{producer}.kernel") / s
        if f"{producer}.bias" in names:
            new[f"{producer}.bias"] = get(f"{producer}.bias") / s
        for reader in pair.readers:
            new[f"{reader}.kernel"] = get(f"{reader}.kernel") * s[:, None]
    return model.rebuilt(model.config, {name: jnp.asarray(value, model.parameter(name).dtype) for name, value in new.items()})


def verify_equivalence(model: Model, transformed: Model, tokens: Any, tolerance: float = 0.0) -> float:
    """max |difference of logits| / max |logits|, of a transform that should change nothing.

    Args:
      tokens: int[B, T].
      tolerance: largest that is allowed; 0: 1e-4 for a model in float32, 3e-2 in narrower types.
    Raises:
      ConfigError: it is larger, or no number.
    """
    wanted, found = (logits(one, tokens) for one in (model, transformed))
    error = float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))
    allowed = tolerance or (1e-4 if model.config.dtype == "float32" else 3e-2)
    check(error <= allowed, "equivalence of a transform", error, f"the logits may differ by {allowed} of the largest")
    return error


def note_equivalence(work: Work, name: str, before: Model, after: Model) -> None:
    """Verify on calibration tokens that a pass changed no logit, and note the largest difference.

    Raises:
      ConfigError: see `verify_equivalence`.
    """
    work.note(name, equivalence=verify_equivalence(before, after, work.calibration.tokens[:1, :VERIFIED_TOKENS]))


def logits(model: Model, tokens: Any) -> np.ndarray:
    """What a model gives for tokens int[B, T], float64 [B, T, V]."""

    def run(values: Any) -> Any:
        return nnx_compat.merge(model.structure, values)({"tokens": jnp.asarray(tokens)}, Context(mode="prefill"))[0]

    return np.asarray(jax.jit(run)(model.values), np.float64)
