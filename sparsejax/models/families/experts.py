"""Layers with experts in a `config.json`, and the `moe` feed that they are here."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsejax import plugs
from sparsejax.io.name_map import Entry, Stacked, Transposed, entry
from sparsejax.models.config import ModelConfig
from sparsejax.models.families.keys import Keys, shortest_period
from sparsejax.plugs import check

DENSE = "ffn"


def expert_entries(theirs: str, *, router: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    """One Linear per expert and map, named `THEIRS.experts.{expert}.MAP.weight`, and the router `THEIRS.ROUTER.weight`."""
    ours, maps = "blocks.{layer}.mlp", {"gate": gate, "up": up, "down": down}
    return (
        entry(f"{ours}.router.kernel", f"{theirs}.{router}.weight", Transposed()),
        *(
            entry(f"{ours}.experts.{name}.kernel", f"{theirs}.experts.{{expert}}.{map_}.weight", Stacked(Transposed()))
            for name, map_ in maps.items()
        ),
    )


def read_feed(
    keys: Keys, *, experts: str, hidden: str, renormalised: bool, shared: int = 0, shared_gate: bool = False
) -> str:
    """The feed of a layer with experts.

    Args:
      experts, hidden: what the family calls their number and their width.
      renormalised: whether the chosen experts' probabilities are divided by their sum.
      shared, shared_gate: see `sparsejax.methods.moe.softmax_top_k`.
    Raises:
      ConfigError: names the key.
    """
    number, k = keys.integer(experts), keys.integer("num_experts_per_tok")
    keys.check(k <= number, "num_experts_per_tok", f"there are {number} experts")
    keys.check(k > 1 or not renormalised, "num_experts_per_tok", "one expert whose weight is divided by itself has no router")
    return _text(number, k, keys.integer(hidden), renormalised, shared, shared_gate)


def _text(experts: int, k: int, hidden: int, renormalised: bool, shared: int, shared_gate: bool) -> str:
    also = f",shared={shared}" if shared else ""
    gated = ",shared_gate=true" if shared_gate else ""
    return f"moe:experts={experts},k={k},hidden={hidden},combine={'renorm' if renormalised else 'raw'}{also}{gated}"


def sparse_pattern(keys: Keys, layers: int, feed: str) -> tuple[str, ...]:
    """`feed_pattern` of Qwen's models: every `decoder_sparse_step`-th layer has experts, but those of `mlp_only_layers`."""
    step, dense = keys.integer("decoder_sparse_step", 1), keys.value("mlp_only_layers", [])
    places = isinstance(dense, list) and all(type(layer) is int and 0 <= layer < layers for layer in dense)
    keys.check(places, "mlp_only_layers", f"expected numbers of layers, from 0 to {layers - 1}")
    pattern = [DENSE if layer in dense or (layer + 1) % step else feed for layer in range(layers)]
    keys.check(feed in pattern, "decoder_sparse_step", f"leaves none of {layers} layers with experts")
    return shortest_period(pattern)


def dense_layers(config: ModelConfig) -> list[int]:
    """The layers without experts."""
    pattern = config.feed_pattern
    return [layer for layer in range(config.num_layers) if pattern[layer % len(pattern)] == DENSE]


def experts_of(config: ModelConfig) -> Any:
    """The spec of all layers with experts.

    Raises:
      ConfigError: there are none, several kinds, or another kind of feed.
    """
    feeds = sorted(set(config.feed_pattern) - {DENSE})
    only = len(feeds) == 1 and feeds[0].partition(":")[0] == "moe"
    check(only, "model.feed_pattern", config.feed_pattern, "expected one kind of experts, 'moe:...', beside dense layers")
    return plugs.resolve("feed", feeds[0], "model.feed_pattern")


def number_of_experts(config: ModelConfig) -> int:
    """E."""
    return experts_of(config).experts


def in_plain_terms(config: ModelConfig, *, one_width: bool = False) -> ModelConfig:
    """The config with its experts as `read_feed` writes them: without what only training needs (capacity, balance).

    Args:
      one_width: the family has one key for the width, of experts only; that of a dense FFN, which no layer has, is set to it.
    """
    spec = experts_of(config)
    renormalised = spec.combine == "renorm"
    feed = _text(spec.experts, spec.k, spec.width(config), renormalised, spec.shared, spec.shared_gate)
    ffn = dataclasses.replace(config.ffn, hidden=spec.width(config)) if one_width else config.ffn
    pattern = tuple(one if one == DENSE else feed for one in config.feed_pattern)
    return dataclasses.replace(config, feed_pattern=pattern, ffn=ffn)
