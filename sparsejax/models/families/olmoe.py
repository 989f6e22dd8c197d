"""OLMoE: raw gates, and the norms at q and k act on all heads of a token together (2409.02060)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsejax.io.family import register_family
from sparsejax.models.config import ModelConfig
from sparsejax.models.families import llama
from sparsejax.models.families.experts import experts_of, in_plain_terms, number_of_experts, read_feed
from sparsejax.models.families.inverse import check_inverse
from sparsejax.models.families.keys import Keys
from sparsejax.models.families.qwen_moe import EXPERT_ENTRIES


def _to_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "olmoe")
    keys.only("clip_qkv", None, "clipping of queries, keys and values")
    width = keys.integer("hidden_size")
    attention = llama.read_heads(keys, width, kv_heads=0)
    inner = attention.num_heads * attention.head_dim
    keys.check(inner == width, "head_dim", f"expected hidden_size / num_attention_heads = {width // attention.num_heads}")
    attention.bias = attention.out_bias = keys.flag("attention_bias", False)
    attention.qk_norm, attention.qk_norm_over = True, "projection"
    config = llama.read_decoder(keys, width, attention)
    renormalised = keys.flag("norm_topk_prob", False)
    config.feed_pattern = (read_feed(keys, experts="num_experts", hidden="intermediate_size", renormalised=renormalised),)
    keys.finish("router_*")
    return config


def _to_published(config: ModelConfig) -> dict[str, Any]:
    config, spec = in_plain_terms(config, one_width=True), experts_of(config)
    common = llama.write_decoder(config)
    del common["head_dim"]  # always hidden_size / num_attention_heads; `check_inverse` refuses another
    published = {
        "model_type": "olmoe",
        **common,
        "attention_bias": config.attention.bias,
        "clip_qkv": None,
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.k,
        "norm_topk_prob": spec.combine == "renorm",
    }
    return check_inverse(config, published, _to_config, "olmoe")


ENTRIES = (*llama.ENTRIES, *EXPERT_ENTRIES)
register_family(
    llama.decoder_family("olmoe", "OlmoeForCausalLM", _to_config, _to_published, ENTRIES, experts=number_of_experts), "olmoe"
)
