"""Mixtral: Llama whose every feed-forward network is k of E experts, their probabilities renormalised (2401.04088)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsejax.io.family import register_family
from sparsejax.models.config import ModelConfig
from sparsejax.models.families import llama
from sparsejax.models.families.experts import expert_entries, experts_of, in_plain_terms, number_of_experts, read_feed
from sparsejax.models.families.inverse import check_inverse
from sparsejax.models.families.keys import Keys

THETA = 1e6  # where the config gives none

ENTRIES = (
    *llama.ENTRIES,
    *expert_entries("model.layers.{layer}.block_sparse_moe", router="gate", gate="w1", up="w3", down="w2"),
)


def _to_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "mixtral")
    width = keys.integer("hidden_size")
    attention = llama.read_heads(keys, width, kv_heads=8)
    attention.window = keys.integer("sliding_window", 0, null=0)
    config = llama.read_decoder(keys, width, attention, ("local" if attention.window else "global",))
    if not any(keys.given(key) for key in ("rope_theta", "rope_parameters")):
        config.positions.rope.theta = THETA
    feed = read_feed(keys, experts="num_local_experts", hidden="intermediate_size", renormalised=True)
    config.feed_pattern = (feed,)
    keys.finish("router_*")
    return config


def _to_published(config: ModelConfig) -> dict[str, Any]:
    config, spec = in_plain_terms(config, one_width=True), experts_of(config)
    published = {
        "model_type": "mixtral",
        **llama.write_decoder(config),
        "sliding_window": config.attention.window or None,
        "num_local_experts": spec.experts,
        "num_experts_per_tok": spec.k,
    }
    return check_inverse(config, published, _to_config, "mixtral")


register_family(
    llama.decoder_family("mixtral", "MixtralForCausalLM", _to_config, _to_published, ENTRIES, experts=number_of_experts),
    "mixtral",
)
